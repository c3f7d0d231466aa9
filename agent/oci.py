"""From the API's Spec back to an OCI config.json, as dictionaries. Pure.

The API cannot tell 0 from "not given", so a 0 among the resources means "not given" here (Kata's rule), and
so does an empty string or list anywhere. What a guest does not do is dropped: hooks (the host ran its own),
user namespaces of the host, network namespaces (the guest has one network, that of the pod), labels and
profiles of security modules that its kernel does not have, and annotations, some of which crun takes as
orders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from agent.schema import oci

    Json = dict[str, object]

# The version of what is written here, whatever the host's spec was written for: nothing newer is used, and a
# runtime older than the host's containerd refuses its "1.2.0" (crun 1.8: "unknown version specified").
OCI_VERSION = "1.0.2"
NET = "net."  # these sysctls belong to the pod's network, which is the guest's: see `net_sysctls`

# Kata's agent adds these to every container's device rules: mknod of anything, the nodes that a /dev has,
# console, pts, ptmx and tun.
_DEFAULT_DEVICE_RULES: tuple[tuple[str, int | None, int | None, str], ...] = (
    ("c", None, None, "m"),
    ("b", None, None, "m"),
    ("c", 1, 3, "rwm"),
    ("c", 1, 5, "rwm"),
    ("c", 1, 7, "rwm"),
    ("c", 1, 8, "rwm"),
    ("c", 1, 9, "rwm"),
    ("c", 5, 0, "rwm"),
    ("c", 5, 1, "rwm"),
    ("c", 5, 2, "rwm"),
    ("c", 10, 200, "rwm"),
    ("c", 136, None, "rwm"),
)

# Nodes that the runtime makes by itself; a second entry for one would fail with "exists".
_OWN_DEVICES = frozenset(
    "/dev/" + name for name in ("null", "zero", "full", "tty", "urandom", "random", "console", "ptmx")
)


def given(**values: object) -> Json:
    """Return what has a value: no zeros, empty strings or lists."""
    return {key: value for key, value in values.items() if value}


def config(
    spec: oci.Spec, *, root: str, namespaces: Mapping[str, str], cgroups_path: str, add_hostname: bool = False
) -> Json:
    """Return config.json for a container.

    `namespaces`: the paths of namespaces to join, by type; "" asks for a new one. It has the last word over
    the spec's own, which only add types that it does not name.

    Raises:
        Unsupported: the container is to have a user namespace with mappings.
    """
    linux = spec.Linux
    if linux.UIDMappings or linux.GIDMappings:
        raise Unsupported(
            "linux.uidMappings and linux.gidMappings are not supported: "
            "run the container without a user namespace, for the VM has a kernel of its own"
        )
    merged = {entry.Type: entry.Path for entry in linux.Namespaces if entry.Type not in ("network", "user")}
    if "cgroup" in merged and not merged["cgroup"]:
        merged["cgroup"] = ""
    merged["mount"] = merged.get("mount", "")
    merged.update(namespaces)
    result: Json = {
        "ociVersion": OCI_VERSION,
        "process": process(spec.Process),
        "root": {"path": root, "readonly": bool(spec.Root.Readonly)},
        "mounts": [mount(entry) for entry in spec.Mounts],
        "linux": {
            "namespaces": [given(type=kind, path=path) for kind, path in merged.items()],
            "resources": resources(linux.Resources, with_devices=True),
            "cgroupsPath": cgroups_path,
            **given(
                sysctl={k: v for k, v in linux.Sysctl.items() if not k.startswith((NET, "net/"))},
                devices=[device(entry) for entry in linux.Devices if entry.Path not in _OWN_DEVICES],
                seccomp=seccomp(linux.Seccomp) if spec.Linux.HasField("Seccomp") else None,
                rootfsPropagation=linux.RootfsPropagation,
                maskedPaths=list(linux.MaskedPaths),
                readonlyPaths=list(linux.ReadonlyPaths),
            ),
        },
    }
    if add_hostname:
        result.update(given(hostname=spec.Hostname))
    return result


def net_sysctls(spec: oci.Spec) -> dict[str, str]:
    """Return the sysctls of the network as files below /proc/sys with what to write to them.

    Components that hold a dot are written with slashes instead: "net/ipv4/conf/eth0.1/forwarding"
    (sysctl(8)).
    """
    return {
        key
        if "/" in key.partition(".")[0]
        else key.replace("/", "\0").replace(".", "/").replace("\0", "."): value
        for key, value in spec.Linux.Sysctl.items()
        if key.startswith((NET, "net/")) and ".." not in key.replace("/", ".").split(".")
    }


def process(message: oci.Process, *, capabilities: oci.LinuxCapabilities | None = None) -> Json:
    """Return the process part, or a process.json. `capabilities` are used if the message has none."""
    user = message.User
    own = message.Capabilities if message.HasField("Capabilities") else capabilities
    size = message.ConsoleSize
    return {
        "terminal": bool(message.Terminal),
        "user": {
            "uid": user.UID,
            "gid": user.GID,
            **({"umask": user.Umask} if user.HasField("Umask") else {}),
            **given(additionalGids=list(user.AdditionalGids), username=user.Username),
        },
        "args": list(message.Args),
        "env": list(message.Env),
        "cwd": message.Cwd or "/",
        "noNewPrivileges": bool(message.NoNewPrivileges),
        **({"capabilities": _capabilities(own)} if own is not None else {}),
        **(
            {"consoleSize": {"height": size.Height, "width": size.Width}}
            if size.Height and size.Width
            else {}
        ),
        **given(
            rlimits=[
                {"type": limit.Type, "hard": limit.Hard, "soft": limit.Soft} for limit in message.Rlimits
            ],
            oomScoreAdj=message.OOMScoreAdj,
        ),
    }


def _capabilities(message: oci.LinuxCapabilities) -> Json:
    return {
        "bounding": list(message.Bounding),
        "effective": list(message.Effective),
        "inheritable": list(message.Inheritable),
        "permitted": list(message.Permitted),
        "ambient": list(message.Ambient),
    }


def mount(message: oci.Mount) -> Json:
    """Return one mount."""
    return {
        "destination": message.destination,
        **given(source=message.source, type=message.type, options=list(message.options)),
    }


def device(message: oci.LinuxDevice) -> Json:
    """Return one device node."""
    node: Json = {"path": message.Path, "type": message.Type, "uid": message.UID, "gid": message.GID}
    if message.Type != "p":
        node.update(major=message.Major, minor=message.Minor)
    return {**node, **given(fileMode=message.FileMode)}


def resources(message: oci.LinuxResources, *, with_devices: bool = False) -> Json:
    """Return the limits that are given. `with_devices` adds the device rules, which an update must not
    touch.
    """
    result = given(
        memory=_memory(message.Memory),
        cpu=_cpu(message.CPU),
        pids=given(limit=message.Pids.Limit),
        blockIO=_block_io(message.BlockIO),
        hugepageLimits=[
            {"pageSize": limit.Pagesize, "limit": limit.Limit} for limit in message.HugepageLimits
        ],
        network=given(
            classID=message.Network.ClassID,
            priorities=[
                {"name": entry.Name, "priority": entry.Priority} for entry in message.Network.Priorities
            ],
        ),
    )
    if with_devices:
        result["devices"] = [*_device_rules(message.Devices)]
    return result


def _memory(message: oci.LinuxMemory) -> Json:
    swap = message.Swap
    if message.Limit == -1 and not swap:
        swap = -1  # without a limit of memory there is none of the sum either
    return given(
        limit=message.Limit,
        reservation=message.Reservation,
        swap=swap,
        kernel=message.Kernel,
        kernelTCP=message.KernelTCP,
        swappiness=message.Swappiness,
        disableOOMKiller=message.DisableOOMKiller,
    )


def _cpu(message: oci.LinuxCPU) -> Json:
    return given(
        shares=message.Shares,
        quota=message.Quota,
        period=message.Period,
        realtimeRuntime=message.RealtimeRuntime,
        realtimePeriod=message.RealtimePeriod,
        cpus=message.Cpus,
        mems=message.Mems,
    )


def _block_io(message: oci.LinuxBlockIO) -> Json:
    def throttles(entries: Iterable[oci.LinuxThrottleDevice]) -> list[Json]:
        return [{"major": entry.Major, "minor": entry.Minor, "rate": entry.Rate} for entry in entries]

    return given(
        weight=message.Weight,
        leafWeight=message.LeafWeight,
        weightDevice=[
            {
                "major": entry.Major,
                "minor": entry.Minor,
                **given(weight=entry.Weight, leafWeight=entry.LeafWeight),
            }
            for entry in message.WeightDevice
        ],
        throttleReadBpsDevice=throttles(message.ThrottleReadBpsDevice),
        throttleWriteBpsDevice=throttles(message.ThrottleWriteBpsDevice),
        throttleReadIOPSDevice=throttles(message.ThrottleReadIOPSDevice),
        throttleWriteIOPSDevice=throttles(message.ThrottleWriteIOPSDevice),
    )


def _device_rules(entries: Iterable[oci.LinuxDeviceCgroup]) -> Iterable[Json]:
    """Return the rules in order: the spec's, then what every container may use.

    A spec without rules (a host that constrains removes them) denies everything first, as the default is.
    """
    listed = list(entries)
    if not listed:
        yield {"allow": False, "access": "rwm"}
    for entry in listed:
        # Numbers of 0 and -1 mean any: a rule for major 0 has no device to be about.
        yield {
            "allow": bool(entry.Allow),
            **given(type=entry.Type, access=entry.Access),
            **({"major": entry.Major} if entry.Major > 0 else {}),
            **({"minor": entry.Minor} if entry.Minor > 0 or (entry.Minor == 0 < entry.Major) else {}),
        }
    for kind, major, minor, access in _DEFAULT_DEVICE_RULES:
        numbers = {key: value for key, value in (("major", major), ("minor", minor)) if value is not None}
        yield {"allow": True, "type": kind, **numbers, "access": access}


def seccomp(message: oci.LinuxSeccomp) -> Json:
    """Return the system call filter."""
    return {
        "defaultAction": message.DefaultAction,
        **given(architectures=list(message.Architectures), flags=list(message.Flags)),
        "syscalls": [_syscall(entry) for entry in message.Syscalls],
    }


def _syscall(message: oci.LinuxSyscall) -> Json:
    rule: Json = {"names": list(message.Names), "action": message.Action}
    if message.HasField("errnoret"):
        rule["errnoRet"] = message.errnoret
    arguments = [
        {
            "index": argument.Index,
            "value": argument.Value,
            "op": argument.Op,
            **given(valueTwo=argument.ValueTwo),
        }
        for argument in message.Args
    ]
    return {**rule, **given(args=arguments)}


def cgroups_path(requested: str, container_id: str) -> str:
    """Return the cgroup of a container below the root: systemd's form slice:prefix:name becomes a path."""
    parts = [part for part in requested.replace(":", "/").split("/") if part not in ("", ".", "..")]
    return "/" + "/".join(parts or [container_id])
