"""Kata's keys that are known and not implemented, so that a Kata configuration file loads.

Each stands beside the values at which ignoring it changes nothing, Kata's own default among them unless it
promises something: with one of these it is ignored silently, with any other the load leaves a warning. The
keys of `REFUSED` promise what a warning cannot replace, so any other value of theirs is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# Tables whose every key is ignored: programs that Kata 1.x had beside the shim.
IGNORED_SECTIONS: Final = frozenset({"proxy.kata", "shim.kata", "netmon"})

_OFF: Final = (False,)
_ZERO: Final = (0,)
_EMPTY: Final = ("",)
_NONE: Final[tuple[object, ...]] = ([],)

IGNORED: Final[Mapping[str, Mapping[str, tuple[object, ...]]]] = {
    "hypervisor": {
        "jailer_path": _EMPTY,
        "valid_jailer_paths": _NONE,
        "kernel_verity_params": _EMPTY,
        "firmware": _EMPTY,
        "firmware_volume": _EMPTY,
        "pflashes": _NONE,
        "disable_seccomp": _OFF,
        "default_bridges": (0, 1),
        "memory_offset": _ZERO,
        "enable_virtio_mem": _OFF,
        "disable_block_device_use": (True, False),
        "virtio_fs_cache_size": _ZERO,
        "block_device_driver": ("virtio-scsi", "virtio-blk"),
        "block_device_aio": ("io_uring", "threads", "native"),
        "block_device_cache_set": _OFF,
        "block_device_cache_direct": _OFF,
        "block_device_cache_noflush": _OFF,
        "block_device_logical_sector_size": _ZERO,
        "block_device_physical_sector_size": _ZERO,
        "enable_iothreads": _OFF,
        "indep_iothreads": _ZERO,
        "enable_mem_prealloc": _OFF,
        "enable_hugepages": _OFF,
        "reclaim_guest_freed_memory": _OFF,
        "enable_vhost_user_store": _OFF,
        "vhost_user_store_path": ("", "/var/run/kata-containers/vhost-user"),
        "valid_vhost_user_store_paths": ([], ["/var/run/kata-containers/vhost-user"]),
        "vhost_user_reconnect_timeout_sec": _ZERO,
        "enable_iommu": _OFF,
        "enable_iommu_platform": _OFF,
        "enable_numa": _OFF,
        "numa_mapping": _NONE,
        "extra_monitor_socket": _EMPTY,
        "disable_nesting_checks": (True, False),
        "msize_9p": (8192,),
        "disable_image_nvdimm": (True, False),
        "hot_plug_vfio": ("no-port",),
        "cold_plug_vfio": ("no-port",),
        "pcie_root_port": _ZERO,
        "pcie_switch_port": _ZERO,
        "disable_vhost_net": (True, False),
        "guest_hook_path": _EMPTY,
        "rx_rate_limiter_max_rate": _ZERO,
        "tx_rate_limiter_max_rate": _ZERO,
        "disk_rate_limiter_bw_max_rate": _ZERO,
        "disk_rate_limiter_bw_one_time_burst": _ZERO,
        "disk_rate_limiter_ops_max_rate": _ZERO,
        "disk_rate_limiter_ops_one_time_burst": _ZERO,
        "net_rate_limiter_bw_max_rate": _ZERO,
        "net_rate_limiter_bw_one_time_burst": _ZERO,
        "net_rate_limiter_ops_max_rate": _ZERO,
        "net_rate_limiter_ops_one_time_burst": _ZERO,
        "guest_memory_dump_path": _EMPTY,
        "guest_memory_dump_paging": _OFF,
        "enable_guest_swap": _OFF,
        "use_legacy_serial": (True, False),
        "disable_selinux": _OFF,
        "disable_guest_selinux": (True,),
        "snp_certs_path": _EMPTY,
        "snp_id_block": _EMPTY,
        "snp_id_auth": _EMPTY,
        "snp_guest_policy": (0, 196608),
        "tdx_quote_generation_service_socket_port": (0, 4050),
        "measurement_algo": ("", "sha384"),
        "guest_extension_images": _NONE,
        "remote_hypervisor_socket": ("", "/run/peerpod/hypervisor.sock"),
        "remote_hypervisor_timeout": (0, 600),
        "hypervisor_loglevel": (0, 1),
        # Kata 1.x
        "use_vsock": (True, False),
        "enable_realtime": _OFF,
        "enable_swap": _OFF,
        "enable_mlock": _OFF,
        "file_mem_backend": _EMPTY,
        "valid_file_mem_backends": ([], [""]),
        "hotplug_vfio_on_root_bus": _OFF,
        "ctlpath": _EMPTY,
        "valid_ctlpaths": _NONE,
    },
    "agent.kata": {
        "enable_tracing": _OFF,
        "trace_mode": ("", "dynamic"),
        "trace_type": ("", "isolated"),
        "debug_console_enabled": _OFF,
        "cdh_api_timeout": (0, 50),
        "launch_process_timeout": (0, 6),
        "visible_cdi_devices": _OFF,
    },
    "runtime": {
        "enable_vcpus_pinning": _OFF,
        "guest_selinux_label": _EMPTY,
        "enable_tracing": _OFF,
        "jaeger_endpoint": _EMPTY,
        "jaeger_user": _EMPTY,
        "jaeger_password": _EMPTY,
        "sandbox_cgroup_only": _OFF,
        "static_sandbox_resource_mgmt": (True,),  # what is done: a pod's VM keeps its size
        "sandbox_bind_mounts": _NONE,
        "vfio_mode": ("guest-kernel",),
        "disable_guest_empty_dir": (True,),
        "emptydir_mode": ("shared-fs",),
        "enable_pprof": _OFF,
        "dan_conf": ("", "/run/kata-containers/dans"),
        "kubelet_root_dir": ("", "/var/lib/kubelet"),
        "experimental_force_guest_pull": _OFF,
        "pod_resource_api_sock": _EMPTY,
        "enable_agent_pidns": _OFF,
    },
    "factory": {},
}

REFUSED: Final[Mapping[str, tuple[object, ...]]] = {
    "confidential_guest": _OFF,
    "sev_snp_guest": _OFF,
}


def is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    """Say whether ignoring the key changes nothing; 0 and false are different values here."""
    return any(type(value) is type(candidate) and value == candidate for candidate in neutral)
