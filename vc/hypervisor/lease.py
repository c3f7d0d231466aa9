"""A VMM that can change its owner: started under a keeper, and owned by whoever holds its lease.

`keeper.py` says how that works. Here is the owner's side: `leased` starts one, `taken` goes on with one that
was handed over. The rule: who holds the lease is the owner, and nothing else makes an owner. So it is passed
on in one message with all else that an owner needs, and the old owner closes what it has right after that.
"""

from __future__ import annotations

import array
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from vc.errors import HypervisorError
from vc.hypervisor.children import Child, attended, spawn, wait_exited

KEEPER = Path(__file__).with_name("keeper.py")
MAX_MESSAGE = 512  # bytes from a keeper
INT_SIZE = array.array("i").itemsize
START_TIMEOUT = 20.0  # seconds for an interpreter to start on a busy host
# In front of a command line (coreutils): others go first. Not last of all: 10 is a tenth of a busy processor
# and 19 a seventieth (Linux, kernel/sched/core.c: sched_prio_to_weight), which no timeout survives.
BACK_SEAT = ("nice", "-n", "10")


class LeasedChild(Child):
    """A process that a keeper reaps."""

    def __init__(self, name: str, pid: int, *, pidfd: int, lease: int, stderr: int) -> None:
        super().__init__(name, pid, pidfd)
        self.lease = lease
        self.stderr_fd = stderr

    async def reap(self) -> int | None:
        """See `Child.reap`: the keeper tells the status on the lease."""
        while True:
            await trio.lowlevel.wait_readable(self.lease)
            try:
                return int(os.read(self.lease, MAX_MESSAGE))
            except BlockingIOError:
                continue  # see `wait_exited`
            except (OSError, ValueError):
                break
        # The keeper was killed, and the process with it; but not if it had not yet asked for that.
        self.kill_nowait()
        await wait_exited(self.pidfd)
        return None


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
        os.set_blocking(lease.fileno(), False)
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
        data, descriptors = await receive(lease, MAX_MESSAGE, 1)
    if len(descriptors) == 1:
        return int(data), descriptors[0]
    why = data.decode(errors="replace") or f"its keeper ended or did nothing for {START_TIMEOUT:g} s"
    raise HypervisorError(f"cannot start {name}: {why}")


def keeper_of(pid: int) -> int:
    """Return the keeper of a process, its parent; 0 if the process is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])  # proc(5): field 4; the name may hold blanks and brackets


def front_seat(pid: int) -> None:
    """Give each thread of a process our own priority, after it was started with `BACK_SEAT`."""
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, int(thread.name), ours)


async def receive(connection: socket.socket, size: int, count: int) -> tuple[bytes, list[int]]:
    """Receive one record of at most `size` bytes, and up to `count` descriptors. Raises: OSError."""
    flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
    while True:
        await trio.lowlevel.wait_readable(connection)
        try:
            data, ancillary, _, _ = connection.recvmsg(size, socket.CMSG_SPACE(count * INT_SIZE), flags)
        except BlockingIOError:
            continue  # see `wait_exited`
        return data, [descriptor for message in ancillary for descriptor in _rights(*message)]


def _rights(level: int, kind: int, data: bytes) -> list[int]:
    """Return the descriptors in an ancillary message: cmsg(3). Python 3.11's recv_fds ignores its flags."""
    if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS):
        return []
    return array.array("i", data[: len(data) - len(data) % INT_SIZE]).tolist()


@asynccontextmanager
async def taken(name: str, pid: int, *, pidfd: int, lease: int, stderr: int) -> AsyncIterator[LeasedChild]:
    """Own a program that another process has started, as long as the block lasts, or longer if it was parked.

    The descriptors stay the caller's.
    """
    child = LeasedChild(name, pid, pidfd=pidfd, lease=lease, stderr=stderr)
    async with attended(child, os.dup(stderr)):
        yield child
