"""`kata-runtime check`: can this host run pods, how, and what to do if not.

Each check is a function from the configuration to findings, so that one that fails does not hide the others.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from cli.guest import changed_files, read_manifest
from cli.host import file_size, meminfo, program_version, read_text
from cli.report import Finding, Level
from vc.config import Config, load, missing_files
from vc.errors import InvalidArgument, Unsupported
from vc.hypervisor.accelerator import KVM, choose
from vc.hypervisor.base import AUTO

SHIM = "containerd-shim-kata-v2"
RUNTIME_TYPE = "io.containerd.kata.v2"
CONTAINERD_CONFIG = Path("/etc/containerd/config.toml")
# containerd docs/cri/config.md: the plugin's name in configuration files of version 2, and of version 3 (2.x)
CRI_PLUGIN_V2 = "io.containerd.grpc.v1.cri"
CRI_PLUGIN_V3 = "io.containerd.cri.v1.runtime"
HELPERS = ("setpriv", "nsenter", "unshare")  # util-linux; QEMU and virtiofsd are started through them
VMM_MIB = 128  # what QEMU and virtiofsd take beside the guest's memory


def run_checks(explicit: str | None) -> list[Finding]:
    """Look at everything. A configuration that cannot be read ends it at once, for it names the rest."""
    try:
        config = load(explicit, check_files=False)
    except InvalidArgument as exc:
        advice = f"correct it; `{SHIM}` refuses to start a pod with it"
        return [Finding(Level.FAIL, "configuration", str(exc), advice), *check_host()]
    findings = [Finding(Level.OK, "configuration", str(config.source))]
    findings += [Finding(Level.WARN, "configuration", warning) for warning in config.warnings]
    for check in CHECKS:
        findings += check(config)
    return [*findings, *check_host()]


def check_files(config: Config) -> Iterator[Finding]:
    """Look for the programs, and for what the guest boots."""
    for problem in missing_files(config):
        what, _, advice = problem.partition("; ")
        yield Finding(Level.FAIL, "files", what, advice)
    hypervisor = config.hypervisor
    programs = {"QEMU": hypervisor.path}
    if hypervisor.shared_fs == "virtio-fs":
        programs["virtiofsd"] = hypervisor.virtio_fs_daemon
    for name, program in programs.items():
        if not file_size(program):
            continue
        if version := program_version(program):
            yield Finding(Level.OK, name, f"{program}: {version}")
        else:
            yield Finding(Level.FAIL, name, f"{program} --version prints nothing", "is it the right program?")
    for name, asset in (
        ("kernel", hypervisor.kernel),
        ("image", hypervisor.image),
        ("initrd", hypervisor.initrd),
    ):
        if asset and (size := file_size(asset)):
            yield Finding(Level.OK, name, f"{asset} ({size / (1 << 20):.1f} MiB)")


def check_guest(config: Config) -> Iterator[Finding]:
    """Compare the guest's files with the manifest of their build."""
    found = read_manifest(config)
    if found is None:
        return
    path, manifest = found
    changed = changed_files(config, path, manifest)
    for asset in changed:
        advice = "build the guest again, or keep files of one build together"
        yield Finding(Level.WARN, "guest", f"{asset} is not the file that {path} describes", advice)
    if not changed:
        yield Finding(Level.OK, "guest", f"Linux {manifest.get('kernel_version')}, as {path} describes it")


def check_accelerator(config: Config) -> Iterator[Finding]:
    """Say which accelerator a pod would get, and why."""
    requested = config.hypervisor.accelerator
    choice = choose(requested, config.hypervisor.path)
    reasons = "; ".join(choice.reasons)
    if choice.accelerator != KVM:
        advice = "" if requested != AUTO else "use a host with KVM, or set accelerator to tcg to silence this"
        level = Level.WARN if requested == AUTO else Level.OK
        yield Finding(
            level, "accelerator", f"{choice.accelerator}: pods run emulated, and slowly; {reasons}", advice
        )
        return
    really = choose(AUTO, config.hypervisor.path) if requested == KVM else choice
    if really.accelerator == KVM:
        yield Finding(Level.OK, "accelerator", f"kvm: {reasons}")
    else:
        doubts = "; ".join(really.reasons)
        advice = "set accelerator to auto or tcg in [hypervisor.qemu]"
        yield Finding(Level.FAIL, "accelerator", f"kvm, because {reasons}; but {doubts}", advice)


def check_transport(config: Config) -> Iterator[Finding]:
    """Say how the agent would be reached."""
    from vc.hypervisor.qemu.driver import VHOST_VSOCK, agent_transport

    requested = config.hypervisor.agent_transport
    has_vsock = VHOST_VSOCK.exists()
    state = f"{VHOST_VSOCK} {'exists' if has_vsock else 'does not exist'}"
    try:
        chosen = agent_transport(requested, has_vsock=has_vsock)
    except Unsupported as exc:
        yield Finding(Level.FAIL, "agent transport", str(exc))
        return
    yield Finding(Level.OK, "agent transport", f'{chosen}: agent_transport is "{requested}", and {state}')


def check_isolation(config: Config) -> Iterator[Finding]:
    """Say as whom QEMU would run."""
    from vc.hypervisor.configure import vm_config
    from vc.hypervisor.jail import obstacle
    from vc.hypervisor.qemu.driver import needs_of, resolved

    if os.geteuid() != 0 or missing_files(config):
        return  # there is an error about that already
    as_root = "QEMU runs as root without capabilities and sees the host's files"
    if not config.hypervisor.rootless:
        advice = "set rootless to true in [hypervisor.qemu]"
        yield Finding(Level.WARN, "isolation", f"{as_root}: rootless is false", advice)
    elif reason := obstacle(needs_of(resolved(vm_config(config)))):
        advice = "run it where mounts and users can be made, on Linux 5.12 or later"
        yield Finding(Level.WARN, "isolation", f"{as_root}: {reason}", advice)
    else:
        yield Finding(Level.OK, "isolation", "QEMU runs as a user and in a root directory of its own")


def check_memory(config: Config) -> Iterator[Finding]:
    """Compare what one VM takes with what is free."""
    wanted = config.hypervisor.default_memory + VMM_MIB
    free = meminfo().get("MemAvailable", 0) // 1024
    text = f"one VM takes up to {wanted} MiB, {free} MiB are available"
    if wanted <= free:
        yield Finding(Level.OK, "memory", text)
    else:
        advice = "free some, or lower default_memory in [hypervisor.qemu]"
        yield Finding(Level.FAIL, "memory", text, advice)


CHECKS: tuple[Callable[[Config], Iterator[Finding]], ...] = (
    check_files,
    check_guest,
    check_accelerator,
    check_transport,
    check_isolation,
    check_memory,
)


def check_host() -> Iterator[Finding]:
    """Look at what depends on no configuration."""
    if os.geteuid() == 0:
        yield Finding(Level.OK, "privileges", "root")
    else:
        yield Finding(Level.FAIL, "privileges", f"uid {os.geteuid()}", "run it as root, as containerd runs")
    absent = [program for program in HELPERS if shutil.which(program) is None]
    if absent:
        yield Finding(Level.FAIL, "util-linux", f"not on PATH: {', '.join(absent)}", "install util-linux")
    if Path("/dev/net/tun").exists():
        yield Finding(Level.OK, "network", "/dev/net/tun exists")
    else:
        advice = "load the module tun"
        yield Finding(Level.WARN, "network", "/dev/net/tun does not exist: pods will have no network", advice)
    yield from check_containerd()


def check_containerd() -> Iterator[Finding]:
    """Look whether containerd will find the shim; CRI needs a runtime entry too, ctr and nerdctl do not."""
    shim = shutil.which(SHIM)
    if shim is None:
        advice = "install it where containerd's PATH leads, or give its path as the runtime's type"
        yield Finding(Level.WARN, "shim", f"{SHIM} is not on this PATH", advice)
    else:
        yield Finding(Level.OK, "shim", shim)
    text = read_text(CONTAINERD_CONFIG)
    if RUNTIME_TYPE in text or SHIM in text:
        yield Finding(Level.OK, "containerd", f"{CONTAINERD_CONFIG} names {RUNTIME_TYPE}")
        return
    state = f"does not name {RUNTIME_TYPE}" if text else "does not exist"
    plugin = CRI_PLUGIN_V3 if re.search(r"^version\s*=\s*3", text, re.MULTILINE) else CRI_PLUGIN_V2
    advice = (
        f'for Kubernetes add [plugins."{plugin}".containerd.runtimes.kata] '
        f'runtime_type = "{RUNTIME_TYPE}"; `ctr run --runtime {RUNTIME_TYPE}` works without'
    )
    yield Finding(Level.WARN, "containerd", f"{CONTAINERD_CONFIG} {state}", advice)
