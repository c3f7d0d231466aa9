"""What a saved VM is a saved VM of: all facts that a restored one must share with it, and a key for them.

A state fits only into the same machine: the same VMM with the same command line, on files that have not
changed. So the facts are that command line, with what differs from VM to VM set to constants, and what
stat(2) says of the files in it. Whatever is added to the command line one day is thereby in the key.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vc.errors import HypervisorError
from vc.hypervisor.accelerator import KVM, settle
from vc.hypervisor.base import VSOCK, VMConfig
from vc.hypervisor.qemu.command import Vsock, Wiring, command_line
from vc.hypervisor.qemu.driver import VHOST_VSOCK, agent_transport

FORMAT = 1  # of what is saved: a number that no older version knows makes all their templates useless
KEY_LENGTH = 32  # hexadecimal digits; half of the digest is plenty

_NAME, _UUID = "template", "0" * 8
_QMP, _CONSOLE, _MEMORY, _AGENT = 3, 4, 5, 6


def facts_of(config: VMConfig, *, has_vsock: bool, host: Mapping[str, str]) -> dict[str, object]:
    """Collect the facts of a VM whose accelerator is decided. Looks at files, at nothing else.

    Raises:
        HypervisorError: a file is missing.
        Unsupported: there is no such machine.

    """
    wiring = Wiring(qmp=_QMP, console=_CONSOLE, memory=_MEMORY)
    if agent_transport(config.agent_transport, has_vsock=has_vsock) == VSOCK:
        wiring = replace(wiring, vsock=Vsock(descriptor=_AGENT, cid=_AGENT))
    else:
        wiring = replace(wiring, agent=_AGENT)
    files = [path for path in (config.qemu, config.kernel, config.initrd, config.image) if path is not None]
    return {
        "format": FORMAT,
        "command line": command_line(config, wiring, vmid=_NAME, uuid=_UUID),
        "files": {str(path): _stat(path) for path in files},
        "host": dict(host),
    }


def _stat(path: Path) -> list[int]:
    try:
        found = path.stat()
    except OSError as exc:
        raise HypervisorError(f"{str(path)!r}, of which a VM is made: {exc.strerror}") from exc
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


def key_of(facts: Mapping[str, object]) -> str:
    """Return the name under which a VM of these facts is saved."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def identify(config: VMConfig) -> tuple[str, dict[str, object]]:
    """Return the key and the facts of a VM on this host. Blocks: a trial machine may be run.

    Raises: HypervisorError, Unsupported.
    """
    config, _ = settle(config)
    # A processor that is not emulated shows through: to this kernel, on this machine.
    host = {"kernel": os.uname().release, "processor": _processor()} if config.accelerator == KVM else {}
    facts = facts_of(config, has_vsock=VHOST_VSOCK.exists(), host=host)
    return key_of(facts), facts


def _processor() -> str:
    """Return what /proc/cpuinfo says of the first processor, without what changes all the time."""
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    return "\n".join(line for line in first.splitlines() if not line.startswith(("cpu MHz", "bogomips")))
