"""A VMM that can change its owner: started under a keeper, and owned by whoever holds its lease.

`keeper.py` says how that works. Here is the owner's side: `leased` starts one, `taken` goes on with one that
was handed over. The rule: who holds the lease is the owner, and nothing else makes an owner. So it is passed
on in one message with all else that an owner needs, and the old owner closes what it has right after that.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from vc.errors import HypervisorError
from vc.hypervisor.children import Child, attended, spawn

KEEPER = Path(__file__).with_name("keeper.py")
MAX_MESSAGE = 512  # bytes from a keeper
START_TIMEOUT = 20.0  # seconds for an interpreter to start on a busy host
LOWEST_PRIORITY = 19  # sched(7), "nice"
BACK_SEAT = ("nice", "-n", str(LOWEST_PRIORITY))  # coreutils; in front of a command line


class LeasedChild(Child):
    """A process that a keeper reaps."""

    def __init__(self, name: str, pid: int, *, pidfd: int, lease: int, stderr: int) -> None:
        super().__init__(name, pid, pidfd)
        self.lease = lease
        self.stderr_fd = stderr

    async def reap(self) -> int | None:
        """See `Child.reap`: the keeper tells the status on the lease."""
        await trio.lowlevel.wait_readable(self.pidfd)
        await trio.lowlevel.wait_readable(self.lease)
        try:
            return int(os.read(self.lease, MAX_MESSAGE))
        except (OSError, ValueError):
            return None  # the keeper was killed


@asynccontextmanager
async def leased(
    argv: Sequence[str], *, name: str, vm_dir: Path, pass_fds: Sequence[int] = ()
) -> AsyncIterator[LeasedChild]:
    """Run a program under a keeper as long as the block lasts, or longer if it was parked. See `running`.

    The keeper removes `vm_dir` if we are killed. Raises: HypervisorError.
    """
    lease, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with lease:
        with theirs:
            # With the VM's name in it: whoever looks for the processes of the VM finds this one, too.
            keeper_argv = [sys.executable, "-I", "-S", str(KEEPER), str(theirs.fileno())]
            keeper_argv += [f"sandbox-{vm_dir.name},keeper"]
            process, stderr = spawn(keeper_argv, f"the keeper of {name}", [*pass_fds, theirs.fileno()])
        try:
            lease.send(b"".join(os.fsencode(word) + b"\0" for word in (str(vm_dir), *argv)))
            process.wait()  # it forks at once
            pid, pidfd = await _started(lease, name)
        except BaseException:
            os.close(stderr)
            raise
        try:
            child = LeasedChild(name, pid, pidfd=pidfd, lease=lease.fileno(), stderr=stderr)
            async with attended(child, stderr):
                yield child
        finally:
            os.close(pidfd)


async def _started(lease: socket.socket, name: str) -> tuple[int, int]:
    """Wait for the keeper's word that the program runs; return its id and its pidfd."""
    data = b""
    descriptors: list[int] = []
    with trio.move_on_after(START_TIMEOUT):
        await trio.lowlevel.wait_readable(lease)
        data, descriptors, _, _ = socket.recv_fds(lease, MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
    if len(descriptors) == 1:
        return int(data), descriptors[0]
    why = data.decode(errors="replace") or f"its keeper ended or did nothing for {START_TIMEOUT:g} s"
    raise HypervisorError(f"cannot start {name}: {why}")


def front_seat(pid: int) -> None:
    """Give each thread of a process our own priority, after it was started with `BACK_SEAT`."""
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, int(thread.name), ours)


@asynccontextmanager
async def taken(name: str, pid: int, *, pidfd: int, lease: int, stderr: int) -> AsyncIterator[LeasedChild]:
    """Own a program that another process has started, as long as the block lasts, or longer if it was parked.

    The descriptors stay the caller's.
    """
    child = LeasedChild(name, pid, pidfd=pidfd, lease=lease, stderr=stderr)
    async with attended(child, os.dup(stderr)):
        yield child
