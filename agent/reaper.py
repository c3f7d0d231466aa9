"""The children of the agent: one thread reaps them all, and every other one asks it.

As process 1 (or as a subreaper) the agent inherits whatever a dying parent leaves, so it must reap
processes that it never started: among them every container process, which is a grandchild until crun exits.
Rules:

- Nobody else calls any wait function. A child is marked as ended before it is reaped, under the lock that
  `kill` takes, so a signal never reaches a process that got the same pid later.
- While somebody waits for crun to report the pid of a process (`births`), the exits of unknown children are
  kept, so a process that ends before its pid is known here does not lose its exit status.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from agent import log, threads
from agent.errors import RuntimeFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

# signal.SIGPIPE, SIGXFSZ: Python ignores them, and a program that we start would inherit that.
_RESET_SIGNALS = (13, 25)

MAX_KEPT_EXITS = 4096
LOST = 255  # status of a process that is no child of ours (any more)
MAX_OUTPUT = 64 << 10  # of a program whose output we want, in bytes

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": PATH}


class Child:
    """A process that ends once. `status` is None until then: the exit code, or 128 plus the signal."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._callbacks: list[Callable[[int], None]] = []

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until it has ended; returns its status, or None after `timeout` seconds."""
        self._ended.wait(timeout)
        return self.status

    def kill(self, signal: int) -> None:
        """Send a signal.

        Raises:
            ProcessLookupError: the process has ended.
        """
        with self._lock:
            if self.status is not None:
                raise ProcessLookupError(f"process {self.pid} has ended")
            os.kill(self.pid, signal)

    def on_end(self, callback: Callable[[int], None]) -> None:
        """Call this with the status, from the reaper's thread; at once if it has ended. It must not block."""
        with self._lock:
            if self.status is None:
                self._callbacks.append(callback)
                return
        callback(self.status)

    def _end(self, status: int) -> None:
        with self._lock:
            self.status = status
            callbacks, self._callbacks = self._callbacks, []
        try:
            for callback in callbacks:
                callback(status)
        except Exception as exc:  # or nobody would be told of this exit, or of any later one
            log.exception("what follows an exit failed", exc, pid=self.pid)
        finally:
            self._ended.set()


class Births:
    """While this block lasts, exits of unknown children are kept for `Reaper.adopt`."""

    def __init__(self, reaper: Reaper) -> None:
        self._reaper = reaper

    def __enter__(self) -> None:
        with self._reaper._lock:
            self._reaper._expecting += 1

    def __exit__(
        self, _type: type[BaseException] | None, _exc: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        with self._reaper._lock:
            self._reaper._expecting -= 1
            if not self._reaper._expecting:
                self._reaper._kept.clear()


class Reaper:
    """Starts and reaps. `start` once; it works until the process ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._children: dict[int, Child] = {}
        self._kept: dict[int, int] = {}
        self._expecting = 0
        self._born = threading.Event()

    def start(self) -> None:
        """Begin to reap, in a thread of its own."""
        threads.start("reaper", self._reap)

    def describe(self) -> str:
        """Return what is known of children, for a report."""
        with self._lock:
            return f"running {sorted(self._children)}, kept exits {self._kept}, expecting {self._expecting}"

    def births(self) -> Births:
        """Return the block in which children that we do not know yet may end."""
        return Births(self)

    def adopt(self, pid: int) -> Child:
        """Return the child with this pid, which another program (crun) made and told us; within `births`."""
        with self._lock:
            child = Child(pid)
            status = self._kept.pop(pid, None)
            if status is None and not _is_child(pid):
                status = LOST
            if status is None:
                self._children[pid] = child
        if status is not None:
            child._end(status)
        return child

    def spawn(
        self,
        argv: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        environment: Mapping[str, str] = ENVIRONMENT,
    ) -> Child:
        """Start a program, found on PATH. A stream that is not given is /dev/null."""
        actions: list[tuple[object, ...]] = []
        for number, fd in enumerate((stdin, stdout, stderr)):
            if fd is None:
                actions.append((os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_RDWR, 0))
            else:
                actions.append((os.POSIX_SPAWN_DUP2, fd, number))
        with self._lock:
            pid = os.posix_spawnp(
                argv[0],
                list(argv),
                environment,
                file_actions=actions,
                setsigdef=_RESET_SIGNALS,
                setsigmask=(),
            )
            child = self._children[pid] = Child(pid)
        self._born.set()
        return child

    def run(
        self,
        argv: Sequence[str],
        *,
        data: bytes = b"",
        check: bool = True,
        environment: Mapping[str, str] = ENVIRONMENT,
    ) -> tuple[int, bytes]:
        """Run a program to its end, giving it `data`; returns its status, and its output and errors in one.

        Raises:
            RuntimeFailed: `check` is true and it failed; the text is its output.
        """
        reader, writer = os.pipe()
        source, sink = os.pipe() if data else (None, None)
        try:
            child = self.spawn(argv, stdin=source, stdout=writer, stderr=writer, environment=environment)
        except BaseException:
            os.close(reader)
            if sink is not None:
                os.close(sink)
            raise
        finally:
            os.close(writer)
            if source is not None:
                os.close(source)
        if sink is not None:
            _feed(sink, data)
        output = bytearray()
        with open(reader, "rb", buffering=0) as pipe:
            while piece := pipe.read(65536):
                output += piece[: MAX_OUTPUT - len(output)]
        status = child.wait()
        assert status is not None
        if check and status:
            text = output.decode("utf-8", "replace").strip()
            raise RuntimeFailed(f"{' '.join(argv)}: {text or f'exit status {status}'}")
        return status, bytes(output)

    def _reap(self) -> None:
        while True:
            self._born.clear()
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            except ChildProcessError:
                self._born.wait()
                continue
            if ended is None:
                continue
            # CLD_EXITED has the code, CLD_KILLED and CLD_DUMPED the signal: waitid(2).
            status = ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status
            with self._lock:
                child = self._children.pop(ended.si_pid, None)
                if child is None and self._expecting:
                    self._keep(ended.si_pid, status)
            if child is not None:
                child._end(status)
            os.waitpid(ended.si_pid, 0)

    def _keep(self, pid: int, status: int) -> None:
        if len(self._kept) >= MAX_KEPT_EXITS:
            del self._kept[next(iter(self._kept))]
        self._kept[pid] = status


def _is_child(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _feed(fd: int, data: bytes) -> None:
    """Write all data to a program's standard input and close it. The program may stop reading early."""
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    except BrokenPipeError:
        pass
    finally:
        os.close(fd)
