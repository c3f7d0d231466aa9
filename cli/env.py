"""`kata-runtime env`: what is configured and installed here, in the sections and names of Kata's kata-env.

After Kata's sections come two of ours: `Guest`, the manifest of the guest's build, and `Config`, every key
with the value that counts after defaults and drop-ins.
"""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cli.check import SHIM
from cli.guest import read_manifest
from cli.host import cpuinfo, meminfo, os_release, program_version
from cli.report import format_value
from vc.config import AgentConfig, Config, FactoryConfig, HypervisorConfig, RuntimeConfig, keys
from vc.hypervisor.accelerator import choose

DISTRIBUTION = "pykata"
FORMAT_VERSION = "1.0.27"  # of Kata's kata-env, whose names these are
OCI_VERSION = "1.2.0"  # the newest runtime specification whose documents are understood

SECTIONS: tuple[tuple[str, type], ...] = (
    ("hypervisor", HypervisorConfig),
    ("agent", AgentConfig),
    ("runtime", RuntimeConfig),
    ("factory", FactoryConfig),
)


def own_version() -> str:
    """Return the version of the installed distribution."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown (not installed)"


def collect(config: Config) -> dict[str, object]:
    """Return all facts, in the order in which they are shown."""
    hypervisor = config.hypervisor
    facts: dict[str, object] = {
        "Kernel": {"Path": str(hypervisor.kernel), "Parameters": hypervisor.kernel_params},
        "Meta": {"Version": FORMAT_VERSION},
        "Image": {"Path": _text(hypervisor.image)},
        "Initrd": {"Path": _text(hypervisor.initrd)},
        "Hypervisor": _hypervisor(config),
        "Runtime": _runtime(config),
        "Host": _host(config),
        "Agent": {"Type": "kata", "Debug": config.agent.enable_debug, "Trace": False},
    }
    if found := read_manifest(config):
        path, manifest = found
        facts["Guest"] = {"Manifest": str(path), **manifest}
    facts["Config"] = effective(config)
    return facts


def effective(config: Config) -> dict[str, dict[str, object]]:
    """Return every key with its value, as a configuration file would hold them."""
    return {
        name: {key.name: key.kind.format(getattr(getattr(config, name), key.name)) for key in keys(cls)}
        for name, cls in SECTIONS
    }


def list_keys() -> list[str]:
    """Return one line for each configuration key: its table, default, allowed values and meaning."""
    tables = {"hypervisor": "hypervisor.qemu", "agent": "agent.kata"}
    lines = []
    for name, cls in SECTIONS:
        for key in keys(cls):
            default = "required" if key.required else f"default {format_value(key.kind.format(key.default))}"
            ours = ", not in Kata" if key.ours else ""
            where = f"{tables.get(name, name)}.{key.name}"
            lines.append(f"{where}: {key.meaning} ({key.kind.allowed}; {default}{ours})")
    return lines


def _hypervisor(config: Config) -> dict[str, object]:
    hypervisor = config.hypervisor
    choice = choose(hypervisor.accelerator, hypervisor.path)
    return {
        "MachineType": hypervisor.machine_type,
        "Version": program_version(hypervisor.path),
        "Path": str(hypervisor.path),
        "EntropySource": str(hypervisor.entropy_source),
        "SharedFS": hypervisor.shared_fs,
        "VirtioFSDaemon": str(hypervisor.virtio_fs_daemon),
        "VirtioFSDaemonVersion": program_version(hypervisor.virtio_fs_daemon),
        "Accelerator": choice.accelerator,
        "AcceleratorReasons": list(choice.reasons),
        "Debug": hypervisor.enable_debug,
    }


def _runtime(config: Config) -> dict[str, object]:
    runtime = config.runtime
    return {
        "Path": shutil.which(SHIM) or "",
        "Debug": runtime.enable_debug,
        "DisableGuestSeccomp": runtime.disable_guest_seccomp,
        "DisableNewNetNs": runtime.disable_new_netns,
        "Experimental": list(runtime.experimental),
        "Warnings": list(config.warnings),
        "Version": {"OCI": OCI_VERSION, "Semver": own_version()},
        "Config": {"Path": str(config.source)},
    }


def _host(config: Config) -> dict[str, object]:
    system = os.uname()
    release, cpu, memory = os_release(), cpuinfo(), meminfo()
    return {
        "Kernel": system.release,
        "Architecture": system.machine,
        "VMContainerCapable": choose("auto", config.hypervisor.path).accelerator == "kvm",
        "SupportVSocks": Path("/dev/vhost-vsock").exists(),
        "Distro": {"Name": release.get("NAME", ""), "Version": release.get("VERSION_ID", "")},
        "CPU": {
            "Vendor": cpu.get("vendor_id", ""),
            "Model": cpu.get("model name", ""),
            "CPUs": os.cpu_count() or 0,
        },
        "Memory": {
            "Total": memory.get("MemTotal", 0),
            "Available": memory.get("MemAvailable", 0),
            "Free": memory.get("MemFree", 0),
        },
    }


def _text(path: Path | None) -> str:
    return "" if path is None else str(path)
