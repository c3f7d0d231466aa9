"""Which accelerator runs a VM: KVM only if it really works, else TCG, QEMU's translator.

A /dev/kvm that opens proves nothing. There are hosts whose paravirtual KVM without vmx or svm creates VMs
in which a stock kernel hangs for ever, so "auto" wants three things: the CPU's flags, the device, and a
machine that runs. `decide` is pure; `choose` collects the facts, the cheap ones first, and stops at the
first "no".
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from vc.errors import Unsupported
from vc.hypervisor.base import AUTO, VMConfig

log = logging.getLogger(__name__)

KVM = "kvm"
TCG = "tcg"

KVM_DEVICE = Path("/dev/kvm")
PROBE_TIMEOUT = 5.0  # seconds; a KVM that works takes 0.1
VERSION_TIMEOUT = 10.0  # seconds; a QEMU that tells its version takes 0.05
# Before it, TCG with a thread for each vCPU could go on running an instruction that another vCPU had replaced
# while it was being translated. Linux patches its own code so, by a breakpoint that it puts there for a
# moment: now and then a guest then met a breakpoint for ever, and nothing was ever printed. QEMU's commit
# deba78709ae8, "accel/tcg: Always lock pages before translation".
PARALLEL_TCG = (8, 1)
VIRTUALISATION_FLAGS = {"vmx", "svm"}  # Intel's and AMD's: Linux, arch/x86/include/asm/cpufeatures.h


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known about KVM here. None: not looked at, because something before it said no."""

    needs_flags: bool  # other architectures have no such flag in /proc/cpuinfo
    has_flags: bool
    device_error: str | None = None  # "" if it opens
    probe_error: str | None = None  # "" if a machine ran


@dataclass(frozen=True, slots=True)
class Choice:
    """The accelerator, and why, as sentences for an administrator."""

    accelerator: str
    reasons: tuple[str, ...]


def decide(requested: str, facts: Facts) -> Choice:
    """Choose by the facts. What the configuration requests is obeyed, and its doubts are told."""
    if requested == TCG:
        return Choice(TCG, ('the configuration says accelerator = "tcg"',))
    doubts = []
    if facts.needs_flags and not facts.has_flags:
        doubts.append("the CPU has neither the vmx nor the svm flag, so it cannot run VMs in hardware")
    if facts.device_error:
        doubts.append(f"{KVM_DEVICE} does not open: {facts.device_error}")
    if facts.probe_error:
        doubts.append(f"a trial machine with KVM failed: {facts.probe_error}")
    if requested == KVM:
        return Choice(KVM, ('the configuration says accelerator = "kvm"', *doubts))
    if doubts:
        return Choice(TCG, tuple(doubts))
    if facts.device_error is None or facts.probe_error is None:
        return Choice(TCG, ("KVM was not tried",))
    return Choice(KVM, (f"{KVM_DEVICE} opens and a trial machine ran",))


def choose(requested: str, qemu: Path, *, arch: str | None = None) -> Choice:
    """Look at this host and choose. May take some seconds the first time if the CPU has the flags.

    Raises:
        Unsupported: `requested` is not a known accelerator.

    """
    if requested not in (AUTO, KVM, TCG):
        raise Unsupported(f'no accelerator "{requested}": there are auto, kvm and tcg')
    facts = Facts(needs_flags=(arch or os.uname().machine) == "x86_64", has_flags=has_flags())
    steps: list[Callable[[Facts], Facts]] = [
        lambda facts: replace(facts, device_error=_device_error()),
        lambda facts: replace(facts, probe_error=_probe_error(qemu)),
    ]
    if requested == AUTO:
        for step in steps:
            if (facts.needs_flags and not facts.has_flags) or facts.device_error or facts.probe_error:
                break
            facts = step(facts)
    return decide(requested, facts)


def settle(config: VMConfig) -> tuple[VMConfig, Choice]:
    """Decide what the configuration leaves to this host: the accelerator, and whether vCPUs run in parallel.

    Blocks: QEMU may be run, for a trial or for its version. Raises: Unsupported.
    """
    choice = choose(config.accelerator, config.qemu, arch=config.arch)
    parallel = choice.accelerator != TCG or config.vcpus == 1 or qemu_version(config.qemu) >= PARALLEL_TCG
    return replace(config, accelerator=choice.accelerator, parallel_vcpus=parallel), choice


@lru_cache(maxsize=4)
def qemu_version(qemu: Path) -> tuple[int, ...]:
    """Ask a QEMU for its version, as in (7, 2, 22); empty, and older than any, if it does not tell."""
    try:
        done = subprocess.run(
            [str(qemu), "-version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=VERSION_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        log.debug("%s does not tell its version: %s", qemu, exc)
        return ()
    return parse_version(done.stdout)


def parse_version(text: str) -> tuple[int, ...]:
    """Read what `qemu -version` prints; empty if there is no version in it."""
    match = re.search(r"version (\d+(?:\.\d+)+)", text)
    return tuple(int(part) for part in match[1].split(".")) if match else ()


@lru_cache(maxsize=1)
def warn_once(reasons: tuple[str, ...]) -> None:
    """Tell the log that VMs will be slow, once per process."""
    log.warning("VMs run without KVM and will be slow (TCG): %s", "; ".join(reasons))


def has_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU says that it can run VMs."""
    with cpuinfo.open() as lines:
        for line in lines:
            if line.startswith("flags"):  # all CPUs have the same
                return bool(VIRTUALISATION_FLAGS & set(line.split()))
    return False


def _device_error() -> str:
    try:
        os.close(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return exc.strerror or str(exc)
    return ""


@lru_cache(maxsize=4)
def _probe_error(qemu: Path) -> str:
    """Run a machine of 16 MiB without a disk until its firmware has nothing to boot; "" if it got there.

    The firmware writes to its debug port (I/O port 0x402), which shows that guest code ran.
    """
    argv = [str(qemu), "-machine", "q35,accel=kvm", "-m", "16", "-nodefaults", "-no-user-config"]
    argv += ["-display", "none", "-no-reboot", "-boot", "reboot-timeout=0"]
    argv += ["-chardev", "stdio,id=out", "-device", "isa-debugcon,iobase=0x402,chardev=out"]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it did not get through its firmware within {PROBE_TIMEOUT:g} s"
    except OSError as exc:
        return f"{qemu}: {exc.strerror}"
    if done.returncode or b"No bootable device" not in done.stdout:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no output of its firmware"]
        return lines[-1]
    return ""
