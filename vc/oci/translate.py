"""Make the guest's spec out of the host's: pure, no file is looked at.

The VM is the container's host, so what names things of the real host goes: its hooks, cpusets, block I/O
and network limits, security labels, namespace paths, device nodes. What the runtime in the guest can enforce
stays: capabilities, rlimits, seccomp, masked paths, users, sysctls, and the other cgroup limits. What is
taken away without being replaced is told in `notes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from protos.kata import oci_pb2
from vc.errors import InvalidArgument
from vc.oci.mounts import Look, Mount, plan_mounts, refuse_unmade
from vc.oci.wire import WILDCARD, fill, members

# Namespaces that the sandbox as a whole stands for: the VM is the network, cgroup and time namespace.
DROPPED_NAMESPACES: Final = frozenset({"network", "cgroup", "time"})

# Device nodes that every runtime makes in /dev itself (runtime-spec config-linux.md, "Default Devices").
DEFAULT_DEVICES: Final = frozenset(
    f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "console", "ptmx")
)

# Character devices whose numbers mean the same on every Linux (Documentation/admin-guide/devices.txt).
STATIC_MAJORS: Final = frozenset({1, 5, 136})  # memory devices, terminals, ptys
STATIC_NUMBERS: Final = frozenset({(10, 200), (10, 229)})  # tun, fuse


@dataclass(frozen=True, slots=True)
class GuestSpec:
    """What the agent is told: the spec, whether the pod shares its PID namespace, and what was taken away."""

    spec: oci_pb2.Spec
    sandbox_pidns: bool
    notes: tuple[str, ...]


def guest_spec(
    spec: Mapping[str, Any], *, root_path: str, mounts: Iterable[Mount], seccomp: bool
) -> GuestSpec:
    """Translate a container's spec.

    `root_path` and the sources in `mounts` are the guest's. `seccomp` keeps the profile: false if the
    configuration says so. Raises: InvalidArgument.
    """
    notes: list[str] = []
    message = oci_pb2.Spec()
    fill(message, {**spec, "mounts": [], "hooks": None}, "config.json", notes)
    if any(members(spec.get("hooks") or {}, "config.json.hooks").values()):
        notes.append("hooks belong to the host and are not run in the guest")
    _check_process(message.Process, "config.json.process")
    message.Root.Path = root_path
    for mount in mounts:
        message.Mounts.add(
            destination=mount.destination, source=mount.source, type=mount.type, options=mount.options
        )
    _constrain_process(message.Process)
    pidns = _constrain_linux(message.Linux, notes)
    if message.Linux.HasField("Seccomp") and not seccomp:
        message.Linux.ClearField("Seccomp")
        notes.append("the seccomp profile is not applied, for disable_guest_seccomp is true")
    message.ClearField("Solaris")
    message.ClearField("Windows")
    return GuestSpec(message, pidns, tuple(notes))


def guest_process(process: Mapping[str, Any]) -> oci_pb2.Process:
    """Translate the process of an exec. Raises: InvalidArgument."""
    message = oci_pb2.Process()
    fill(message, process, "process", [])
    _check_process(message, "process")
    _constrain_process(message)
    return message


def check_workload(spec: Mapping[str, Any], look: Look) -> None:
    """Refuse what no sandbox could run; `look` asks about the host's files. For before there is a sandbox.

    Raises: InvalidArgument, Unsupported.
    """
    guest_process(members(spec.get("process") or {}, "process"))
    for planned in plan_mounts(spec, look):
        refuse_unmade(planned)


def guest_resources(resources: Mapping[str, Any]) -> oci_pb2.LinuxResources:
    """Translate the resources of an update. Raises: InvalidArgument."""
    message = oci_pb2.LinuxResources()
    fill(message, resources, "resources", [])
    _constrain_resources(message, [])
    return message


def _check_process(process: oci_pb2.Process, path: str) -> None:
    if not process.Args:
        raise InvalidArgument(f"{path}.args is empty: there is nothing to run")
    if not process.Cwd.startswith("/"):
        raise InvalidArgument(f'{path}.cwd: got "{process.Cwd}", must be an absolute path')


def _constrain_process(process: oci_pb2.Process) -> None:
    process.ApparmorProfile = ""
    process.SelinuxLabel = ""


def _constrain_linux(linux: oci_pb2.Linux, notes: list[str]) -> bool:
    """Take the host out of the Linux part; return whether the pod's PID namespace is shared."""
    linux.Resources.SetInParent()  # stock agents refuse a spec without
    _constrain_resources(linux.Resources, notes)
    _constrain_devices(linux, notes)
    linux.MountLabel = ""
    linux.ClearField("IntelRdt")
    shared_pid = any(entry.Type == "pid" and entry.Path for entry in linux.Namespaces)
    mapped = bool(linux.UIDMappings)
    kept = []
    for entry in linux.Namespaces:
        if entry.Type in DROPPED_NAMESPACES or entry.Type == "pid":
            continue
        if entry.Type == "user" and not mapped:
            notes.append("the user namespace has no mappings to make it anew in the guest: left out")
            continue
        kept.append(oci_pb2.LinuxNamespace(Type=entry.Type))
    del linux.Namespaces[:]
    linux.Namespaces.extend(kept)
    return shared_pid


def _constrain_resources(resources: oci_pb2.LinuxResources, notes: list[str]) -> None:
    if resources.HasField("BlockIO"):
        notes.append("linux.resources.blockIO names the host's disks: left out")
    resources.ClearField("BlockIO")
    resources.ClearField("Network")
    if resources.HasField("CPU"):
        resources.CPU.Cpus = ""
        resources.CPU.Mems = ""
    # A kubelet sends 0 for each page size of the host, and the guest may not know the size.
    limits = [limit for limit in resources.HugepageLimits if limit.Limit]
    del resources.HugepageLimits[:]
    resources.HugepageLimits.extend(limits)
    rules = [rule for rule in resources.Devices if _means_the_same(rule)]
    del resources.Devices[:]
    resources.Devices.extend(rules)


def _constrain_devices(linux: oci_pb2.Linux, notes: list[str]) -> None:
    """Keep the nodes that mean the same device in the guest; those of every container are made anyway."""
    kept, foreign = [], []
    for device in linux.Devices:
        if device.Path in DEFAULT_DEVICES:
            continue
        if device.Type == "p" or (device.Type in ("c", "u") and _is_static(device.Major, device.Minor)):
            kept.append(device)
        else:
            foreign.append(f"{device.Path} ({device.Type} {device.Major}:{device.Minor})")
    if foreign:  # one note: a privileged container names all that the host has
        notes.append(f"{len(foreign)} device nodes are the host's and left out: {', '.join(foreign)}")
    del linux.Devices[:]
    linux.Devices.extend(kept)


def _means_the_same(rule: oci_pb2.LinuxDeviceCgroup) -> bool:
    """Tell whether a device rule says in the guest what it said on the host.

    Denying and "any" do. Allowing one number of the host might open another device of the guest.
    """
    if not rule.Allow or rule.Major == WILDCARD:
        return True
    return rule.Type != "b" and _is_static(rule.Major, rule.Minor)


def _is_static(major: int, minor: int) -> bool:
    return major in STATIC_MAJORS or (major, minor) in STATIC_NUMBERS
