"""The processes that a VM consists of: started, watched, killed and reaped in one place.

The rules: they die with this process, their death is known at once and with its cause, and leaving the block
leaves nothing behind. Linux ties the parent-death signal to the *thread* that forked (prctl(2)), so they are
started from trio's own thread; a worker thread ends when it is idle and would take them along.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import select
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

from vc.background import background
from vc.errors import HypervisorError
from vc.hypervisor import oom
from vc.hypervisor.console import ConsoleTail
from vc.hypervisor.jail import Jail

log = logging.getLogger(__name__)

# util-linux. Each of these programs becomes the next one by exec, so the pid stays the same.
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
# A process that needs no capability has none, now or after an exec; as uid 0 it still owns its files.
NO_CAPABILITIES = ("--no-new-privs", "--inh-caps=-all", "--bounding-set=-all")

NO_CORE = 1  # byte: Linux, fs/coredump.c, do_coredump
KILL_GRACE = 5.0  # seconds for the kernel to end a killed process; a VM with much memory takes a while
LAST_WORDS_GRACE = 1.0  # seconds to read what a dead process left in its stderr
READ_SIZE = 4096  # bytes
STDERR_LINES = 5  # in an error message


def prefix(*, netns: str | None = None, capabilities: bool = False, jail: Jail | None = None) -> list[str]:
    """Return the programs in front of a child's own command line.

    `netns`: the path of a network namespace, "" for a new empty one, None for the one we are in. A `jail` has
    that already.
    """
    argv: list[str] = []
    if jail is not None:
        argv += jail.prefix()
    elif netns is not None:
        argv += ["nsenter", f"--net={netns}", "--"] if netns else ["unshare", "--net", "--"]
    argv += DIE_WITH_PARENT
    if jail is not None:
        # setpriv sets the signal last, as it must: to change the user clears it (prctl(2)).
        argv += [f"--reuid={jail.uid}", f"--regid={jail.uid}", "--clear-groups"]
    if not capabilities:
        argv += NO_CAPABILITIES
    return [*argv, "--"]


def describe_exit(name: str, pid: int, status: int | None) -> str:
    """Say how a process ended. `status` as in subprocess: negative is a signal; None if nobody knows."""
    if status is None:
        return f"{name} (pid {pid}) ended with the process that kept it"
    if status >= 0:
        return f"{name} (pid {pid}) exited with status {status}"
    try:
        signal_name = signal.Signals(-status).name
    except ValueError:
        signal_name = f"signal {-status}"
    return f"{name} (pid {pid}) was killed by {signal_name}"


class Child(ABC):
    """A running process. Made by `running`, or by `vc.hypervisor.lease`."""

    def __init__(self, name: str, pid: int, pidfd: int) -> None:
        self.name = name
        self.pid = pid
        self.stderr = ConsoleTail(on_line=lambda line: log.debug("%s: %s", name, line))
        self.exit_status: int | None = None  # as in subprocess: negative after a signal, None while it lives
        self.scope = trio.CancelScope(shield=True)  # of `attend`
        self.parked = False  # it is to outlive us
        self.pidfd = pidfd
        self.out_of_memory = False  # it was killed by the host's OOM killer
        self._ours = False  # we killed it
        self._oom = oom.Watch()
        self._stderr_ended = trio.Event()
        self._dead = trio.Event()
        self._cause = ""

    @property
    def dead(self) -> bool:
        """Whether the process has ended and was reaped."""
        return self._dead.is_set()

    async def wait_dead(self) -> str:
        """Block until the process has ended; return how, and its last words."""
        await self._dead.wait()
        return self._cause

    def kill_nowait(self) -> None:
        """Send SIGKILL, unless it is dead or not ours any more."""
        if self.exit_status is None and not self.dead and not self.parked:
            self._ours = True
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Give back what only the watch of its death needs."""
        self._oom.close()

    async def attend(self, stderr: int) -> None:
        """Read the process's stderr and reap it. Ends when it is dead, and not before: see `attended`."""
        with self.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_stderr, trio.lowlevel.FdStream(stderr))
                await self._watch()
                nursery.cancel_scope.cancel()

    @abstractmethod
    async def reap(self) -> int | None:
        """Block until the process has ended; return its exit status, None if nobody knows it."""

    async def _watch(self) -> None:
        self.exit_status = status = await self.reap()
        with trio.move_on_after(LAST_WORDS_GRACE):
            await self._stderr_ended.wait()
        self._cause = describe_exit(self.name, self.pid, status)
        if status == -signal.SIGKILL and not self._ours:
            self.out_of_memory, why = await self._oom.explain(self.pid)
            self._cause += f"; {why}" if why else ""
        if last_words := self.stderr.last(STDERR_LINES):
            self._cause += f": {last_words}"
        self._dead.set()

    async def _read_stderr(self, stream: trio.lowlevel.FdStream) -> None:
        async with stream:
            while data := await stream.receive_some(READ_SIZE):
                self.stderr.feed(bytes(data))
        self._stderr_ended.set()


class OwnChild(Child):
    """A process that we have started and reap ourselves."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], pidfd: int) -> None:
        super().__init__(name, process.pid, pidfd)
        self._process = process

    async def reap(self) -> int:
        """See `Child.reap`."""
        await wait_exited(self.pidfd)
        result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        assert result is not None  # without WNOHANG there is always one
        status = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        self._process.returncode = status  # or Popen would believe that it still runs
        return status


async def wait_exited(pidfd: int) -> None:
    """Block until a process has ended.

    Asks again, because trio may wake a task for a descriptor of the same number that was closed a moment ago.
    """
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    while not poll.poll(0):
        await trio.lowlevel.wait_readable(pidfd)
    await trio.lowlevel.checkpoint()


@asynccontextmanager
async def running(argv: Sequence[str], *, name: str, pass_fds: Sequence[int] = ()) -> AsyncIterator[Child]:
    """Run a program as long as the block lasts, then kill and reap it.

    `argv` begins with what `prefix` returned. The child gets the descriptors `pass_fds` under their numbers,
    and no others.

    Raises:
        HypervisorError: the first program of the command line does not exist.

    """
    process, stderr = spawn(argv, name, pass_fds)
    pidfd = os.pidfd_open(process.pid)
    try:
        async with attended(OwnChild(name, process, pidfd), stderr) as child:
            yield child
    finally:
        os.close(pidfd)
        if process.returncode is None:
            process.returncode = -signal.SIGKILL  # nothing more can be done, and Popen would complain


@asynccontextmanager
async def attended(child: Child, stderr: int) -> AsyncIterator[Child]:
    """Attend to a process as long as the block lasts, then kill it, unless it was parked; closes `stderr`."""
    try:
        async with background() as nursery:
            nursery.start_soon(child.attend, stderr)
            try:
                yield child
            finally:
                child.kill_nowait()
                # It attends also when we are cancelled, because a killed process must be reaped.
                grace = 0.0 if child.parked else KILL_GRACE
                child.scope.deadline = trio.current_time() + grace
    finally:
        child.close()
    if child.exit_status is None and not child.dead and not child.parked:
        log.error("%s (pid %d) does not die of SIGKILL; it is left behind", child.name, child.pid)


def spawn(argv: Sequence[str], name: str, pass_fds: Sequence[int]) -> tuple[subprocess.Popen[bytes], int]:
    """Start a process; return it and the end of a pipe that is its stdout and stderr.

    Raises: HypervisorError.
    """
    log.debug("starting %s: %s", name, " ".join(argv))
    stderr, child_stderr = os.pipe2(os.O_CLOEXEC)
    try:
        with _limits_of_children():
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=child_stderr,
                stderr=child_stderr,
                pass_fds=pass_fds,
                cwd="/",
                start_new_session=True,  # a Ctrl-C at a terminal is for us, and we end the VM in order
            )
    except BaseException as exc:
        os.close(stderr)
        if isinstance(exc, OSError):
            raise HypervisorError(
                f"cannot start {name}: {argv[0]}: {exc.strerror}; is it installed?"
            ) from exc
        raise
    finally:
        os.close(child_stderr)
    return process, stderr


@contextmanager
def _limits_of_children() -> Iterator[None]:
    """Give children that are started inside limits of their own.

    They never leave a core file: it would hold the guest's memory. That is a limit of 1 byte and not of 0,
    since a core dump that goes to a program is only stopped by that: core(5). And they may open as many files
    as is allowed at all: virtiofsd has one open for each that the guest knows, and the usual 1024 would show
    it directories with files missing.
    """
    core, files = (resource.getrlimit(which) for which in (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE))
    resource.setrlimit(resource.RLIMIT_CORE, (NO_CORE if core[1] else 0, core[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, (files[1], files[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, core)
        resource.setrlimit(resource.RLIMIT_NOFILE, files)


def descendants(pid: int) -> list[int]:
    """Return the children of a process, their children and so on. They may be gone when this returns."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                found += [int(child), *descendants(int(child))]
    return found
