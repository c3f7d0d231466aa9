"""Many lives of containers, several at once, on a containerd of their own, for as long as one likes.

One cycle is the life of one container (lives.py). All that happens in it follows from the seed and the
cycle's number; only how the lives interleave is the machine's. After each round nothing may be left on the
host, and what lives long must not have grown: containerd, and the shim, the VM and the guest of one sandbox
that lives from the first cycle to the last.

The rule of a failure: nothing is tried again. The first one ends the run with the interleaving that led to
it, and with what could be seen of the processes then.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness import leaks, lives
from tests.harness.containerd import Containerd, HarnessError
from tests.harness.events import Recorder
from tests.harness.evidence import threads_below
from tests.harness.processes import processes_of
from tests.harness.runtimes import Runtime, set_factory
from vc import leaks as product_leaks

ROUND = 10  # cycles between two looks at the host
AT_ONCE = 3  # lives
LONG_STEPS = 2  # steps in the sandbox that lives long, for each cycle
WARM_UP = 2  # rounds whose figures do not count for the growth
SHOWN = 200  # lines of the interleaving that a failure shows


class SoakError(Exception):
    """Something was not as it must be; the text is the whole report."""


class Gate:
    """Many may do steps, or one may do something that nobody else's step would survive."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._steps = 0
        self._alone = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Do one step among others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._steps += 1
        try:
            yield
        finally:
            with self._changed:
                self._steps -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody does a step, and let nobody begin one."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._alone = True
            self._changed.wait_for(lambda: not self._steps)
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


class Journal:
    """What was done when, by all lives in one order."""

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.Lock()
        self._lines: list[str] = []
        self._began = time.monotonic()
        self._file = path.open("a", buffering=1) if path is not None else None

    def note(self, who: str, text: str) -> None:
        with self._lock:
            line = f"{time.monotonic() - self._began:8.2f} {who:12} {text}"
            self._lines.append(line)
            if self._file is not None:
                self._file.write(line + "\n")

    def tail(self, count: int) -> str:
        with self._lock:
            return "\n".join(self._lines[-count:])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclass(slots=True)
class Figures:
    """Samples by name, one for each round, in kB unless the name says otherwise."""

    cycles: list[int] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)

    def growth(self, name: str) -> float:
        """Return by how much it grew with each cycle: the slope of a line through what counts."""
        count = len(self.cycles) - WARM_UP
        return slope(self.cycles[-count:], self.samples[name][-count:]) if count >= 2 else 0.0


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the slope of the line with the least squares. The xs are not all the same."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - mean_x) ** 2 for x in xs)


class Soak:
    """A run of cycles. What `run` found is in `figures` and `counts`."""

    def __init__(
        self,
        containerd: Containerd,
        seed: str,
        *,
        journal: Path | None = None,
        only: str = "",
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.containerd = containerd
        self.seed = seed
        self.gate = Gate()
        self.journal = Journal(journal)
        self.figures = Figures()
        self.counts: dict[str, int] = {}
        self.abandoned = 0  # clients that were killed: each leaves the directory of its fifos
        self.only = only
        self.stopping = threading.Event()
        self.recorder: Recorder | None = None
        self.restarts = 0
        self._tell = tell
        self._lock = threading.Lock()
        self._before: frozenset[str] = frozenset()

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def client_abandoned(self) -> None:
        with self._lock:
            self.abandoned += 1

    def run(self, first: int, count: int) -> None:
        """Run cycles `first` to `first + count - 1`. Raises: SoakError."""
        self.journal.note("soak", f"seed {self.seed!r}, cycles {first} to {first + count - 1}")
        self.recorder = Recorder(self.containerd)
        self.recorder.__enter__()
        try:
            with self.containerd.running(flags=["--null-io"]) as long:
                for mode in ("cold", "warm"):  # what is opened once and kept
                    self.containerd.run("echo", mode)
                    self.containerd.exec(long, "true")
                self._before = leaks.snapshot(self.containerd)
                for begin in range(first, first + count, ROUND):
                    cycles = range(begin, min(begin + ROUND, first + count))
                    self._round(cycles, long)
                    self._check_leaks()
                    self._measure(cycles[-1] + 1, long)
                self._check_status(long)
        finally:
            self.recorder.__exit__(None, None, None)
            self.journal.close()

    def restart_daemon(self, *, kill: bool) -> None:
        """End the daemon and start it again; nobody else does anything meanwhile."""
        assert self.recorder is not None
        with self.gate.alone():
            self.recorder.__exit__(None, None, None)
            self.containerd.stop_daemon(kill=kill)
            self.containerd.start_daemon()
            self.restarts += 1
            self.recorder = Recorder(self.containerd)
            self.recorder.__enter__()

    def _round(self, cycles: range, long: str) -> None:
        restarts = self.restarts
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = [pool.submit(self._cycle, cycle, long) for cycle in cycles]
            failures = [error for error in (future.exception() for future in found) if error is not None]
        if failures:
            raise failures[0]
        if self.restarts != restarts:  # another process, with descriptors of its own
            self._before = frozenset(line for line in self._before if not _of_daemon(line))
            self._before |= {line for line in leaks.snapshot(self.containerd) if _of_daemon(line)}

    def _cycle(self, cycle: int, long: str) -> None:
        if self.stopping.is_set():
            return
        chance = random.Random(f"{self.seed}/{cycle}")
        life = lives.Life(self, chance, f"cycle {cycle}")
        try:
            lives.live(life)
            visitor = lives.Life(self, chance, f"long/{cycle}")
            visitor.container = long
            for _ in range(0 if self.only else LONG_STEPS):
                lives.visit(visitor)
        except Exception as exc:
            first = not self.stopping.is_set()
            self.stopping.set()
            life.note(f"FAILED: {type(exc).__name__}: {exc}")
            if first:
                raise SoakError(self._report(f"cycle {cycle}: {exc}", life.container)) from exc

    def _report(self, what: str, container: str) -> str:
        self.containerd.dump_shims()
        guest = "no container"
        if container:
            try:
                listing = ("ps", "-o", "pid,stat,comm")
                guest = str(self.containerd.exec(container, *listing, timeout=10.0))
            except HarnessError as error:
                guest = str(error)[:1000]
        return (
            f"seed {self.seed!r}, {container}: {what}\n\n"
            f"interleaving:\n{self.journal.tail(SHOWN)}\n\nthreads:\n{threads_below(self.containerd.directory)}"
            f"\n\nin the container:\n{guest}\n\nlog:\n{self.containerd.log_since(0, 1_000_000)}"
        )

    def _check_leaks(self) -> None:
        """Let nothing be left by the cycles so far."""
        fifos = self.containerd.directory / "fifo"

        def ours(line: str) -> bool:
            return line.startswith(f"file {fifos}/") or line.endswith(" ctr events")

        left = leaks.left_over(self.containerd, self._before, but=ours)
        orphans = [line for line in leaks.snapshot(self.containerd) - self._before if str(fifos) in line]
        if len(orphans) > self.abandoned:
            left += [f"{len(orphans)} directories of fifos, but only {self.abandoned} clients were killed"]
        assert self.containerd.runtime.run_dir is not None
        found = product_leaks.find(self.containerd.runtime.run_dir, containerd=self.containerd.address)
        left += [str(leak) for leak in found]
        if left:
            raise SoakError(self._report("left behind:\n" + "\n".join(left), ""))

    def _check_status(self, long: str) -> None:
        if (status := self.containerd.task_status(long)) != "RUNNING":
            raise SoakError(f"seed {self.seed!r}: the sandbox that lives long is {status}")

    def _measure(self, cycle: int, long: str) -> None:
        self.figures.cycles.append(cycle)
        for name, value in measure(self.containerd, long).items():
            self.figures.samples.setdefault(name, []).append(value)
        latest = ", ".join(f"{name} {values[-1]:.0f}" for name, values in self.figures.samples.items())
        self._tell(f"{cycle} cycles: {latest}")


def _of_daemon(line: str) -> bool:
    return line.startswith(("descriptor of containerd", "child of containerd"))


def measure(containerd: Containerd, long: str) -> dict[str, float]:
    """Return what memory and descriptors are used by what lives long."""
    figures = {
        "containerd RSS": _memory(containerd.daemon_pid, "Rss"),
        "containerd descriptors (number)": _descriptors(containerd.daemon_pid),
    }
    with suppress(OSError):
        for process in processes_of(containerd.directory):
            if "shim" in process.argv and long in process.argv:
                figures["shim PSS"] = _memory(process.pid, "Pss")
                figures["shim descriptors (number)"] = _descriptors(process.pid)
    vmm = containerd.task_pid(long)
    figures["VMM RSS"] = _memory(vmm, "Rss")
    lines = containerd.exec(long, "cat", "/proc/meminfo").stdout.decode().splitlines()
    guest = {line.split()[0].rstrip(":"): float(line.split()[1]) for line in lines}
    free = guest["MemFree"] + guest["Buffers"] + guest["Cached"] + guest["SReclaimable"]
    figures["guest, in use"] = guest["MemTotal"] - free
    return figures


def _memory(pid: int, field: str) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{field}:")))


def _descriptors(pid: int) -> float:
    return float(len(list(Path(f"/proc/{pid}/fd").iterdir())))


def use_template(containerd: Containerd, runtime: Runtime) -> None:
    """Have VMs of `containerd` go on from a template, which is made now."""
    config = runtime.config
    set_factory(config, enable_template=True, template_path=f"{containerd.directory}/template")
    containerd.program("kata-runtime", "--config", str(config), "factory", "init")
