"""A paused VM in nobody's tasks: what there is to know of it, and the descriptors that are it.

Whoever has them owns the VM, and can hand it over by sending them through a unix socket (unix(7),
SCM_RIGHTS). The rule: they are sent or closed all together.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from vc.errors import HypervisorError

MAX_MESSAGE = 1 << 16  # bytes; most of it is what the guest said about itself
DESCRIPTORS = ("lease", "pidfd", "stderr", "console", "lock")  # in the order in which they are sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked:
    """A VM that waits for its next owner."""

    vmid: str  # its name while it waits; the VMM keeps it for ever
    pid: int  # of the VMM
    cid: int | None  # vsock context id, if the agent is reached by vsock
    details: bytes  # the guest's GuestDetailsResponse
    # Descriptors
    lease: int  # whoever holds it keeps the VMM alive: see `vc.hypervisor.lease`
    pidfd: int  # of the VMM
    stderr: int  # of the VMM, to read from
    console: int  # connected to the guest's console
    lock: int  # holds the lock of the VM's directory

    def descriptors(self) -> list[int]:
        """Return all of them, in the order of `DESCRIPTORS`."""
        return [getattr(self, name) for name in DESCRIPTORS]

    def close(self) -> None:
        """Let go of the VM. Unless it was handed over, it is killed and its directory removed."""
        close_all(self.descriptors())


def with_descriptors(
    descriptors: Sequence[int], *, vmid: str, pid: int, cid: int | None, details: bytes
) -> Parked:
    """Put one together. Raises: ValueError if these are not as many as there should be."""
    named = dict(zip(DESCRIPTORS, descriptors, strict=True))
    return Parked(vmid=vmid, pid=pid, cid=cid, details=details, **named)


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)


def duplicate(*descriptors: int) -> list[int]:
    """Return a copy of each; all or none."""
    made: list[int] = []
    try:
        for descriptor in descriptors:
            made.append(os.dup(descriptor))  # one by one: those before one that fails are closed
    except OSError:
        close_all(made)
        raise
    return made


def format_parked(parked: Parked) -> bytes:
    """Serialise all but the descriptors."""
    details = base64.b64encode(parked.details).decode()
    facts = {"vmid": parked.vmid, "pid": parked.pid, "cid": parked.cid, "details": details}
    return json.dumps(facts).encode()


def parse_parked_untrusted(data: bytes, descriptors: Sequence[int]) -> Parked:
    """Make a VM of what came; its descriptors are closed if it is none. Raises: HypervisorError."""
    try:
        facts = json.loads(data)
        vmid, pid, cid = facts["vmid"], facts["pid"], facts["cid"]
        details = base64.b64decode(facts["details"], validate=True)
        if type(vmid) is not str or not vmid.isalnum() or type(pid) is not int or pid <= 0:
            raise ValueError(f"VM {vmid!r} of process {pid!r}")
        if not (cid is None or type(cid) is int):
            raise ValueError(f"context id {cid!r}")
        return with_descriptors(descriptors, vmid=vmid, pid=pid, cid=cid, details=details)
    except (ValueError, TypeError, KeyError, RecursionError) as exc:  # binascii.Error is a ValueError
        close_all(descriptors)
        raise HypervisorError(f"what was handed over is no VM: {type(exc).__name__}: {exc}") from exc
