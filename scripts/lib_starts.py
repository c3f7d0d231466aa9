"""Starts of pods by where their VM comes from: how long, in which phases, with how much memory, many at once.

One containerd for each kind, so that each has its own configuration; runs are taken in turns. The phases are
those of the runtime's own timeline, which the shim writes to containerd's log at the end of each pod.
"""

import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.harness import runtimes
from tests.harness.cache import Cache
from tests.harness.containerd import Containerd
from tests.harness.processes import processes_of

COLD, TEMPLATE, CACHE, RUNC = "cold", "template", "cache", "runc"
SHIM, VMM, VIRTIOFSD = "shim", "VMM", "virtiofsd"
START_TIMEOUT = 120.0  # seconds for one pod
AT_ONCE_TIMEOUT = 300.0  # seconds for all pods that were started at once
TIMELINE = re.compile(r"timeline of (\S+) since ([0-9.]+): ([^\"\\]*)")

# Each phase with the step that ends it, the first that a start of this kind has.
PHASES: Sequence[tuple[str, Sequence[str]]] = (
    ("containerd and shim start", ("create called",)),
    ("VM ready", ("state loaded", "vm taken", "vmm launched")),
    ("devices", ("vcpus run",)),
    ("agent", ("vm ready",)),
    ("container", ("start answered",)),
    ("first byte of output", ("first output",)),
    ("exit and clean-up", ()),
)


@dataclass(frozen=True, slots=True)
class Start:
    """One `ctr run --rm`, in seconds."""

    first_byte: float
    done: float
    phases: Mapping[str, float]  # empty if the runtime writes no timeline


def measure_start(containerd: Containerd) -> Start:
    """Run a container that says one line."""
    offset, container = containerd.log_size(), containerd.new_id()
    began = time.monotonic()
    client = containerd.popen(*containerd.run_arguments("echo", "up", container=container, flags=["--rm"]))
    assert client.stdout is not None
    first = client.stdout.read(1)
    first_byte = time.monotonic() - began
    _, errors = client.communicate(timeout=START_TIMEOUT)
    done = time.monotonic() - began
    if client.returncode != 0 or not first:
        raise RuntimeError(f"{errors.decode()}\n{containerd.log_since(offset)}")
    return Start(first_byte, done, phases_of(containerd.log_since(offset), container, began, done))


def phases_of(log: str, container: str, began: float, done: float) -> dict[str, float]:
    """Split a start into phases by the timeline in the log."""
    lines = [(float(origin), steps) for name, origin, steps in TIMELINE.findall(log) if name == container]
    if not lines:
        return {}
    origin, steps = lines[0]
    marks = dict(step.rsplit(" ", 1) for step in steps.strip().split(", "))
    phases, at = {}, began
    for phase, ends in PHASES:
        found = [origin + float(marks[end]) for end in ends if end in marks]
        end = (found or [at])[0] if ends else began + done
        phases[phase], at = end - at, end
    return phases


# The kinds


@contextmanager
def kinds(wanted: Sequence[str]) -> Iterator[dict[str, Containerd]]:
    """Give a containerd for each kind, with what its VMs come from."""
    with ExitStack() as stack:
        found = {}
        for kind in wanted:
            containerd = stack.enter_context(Containerd(_runtime(kind), level="info"))
            if kind in STARTS:
                containerd.runtime.start_from(STARTS[kind])
            if kind == TEMPLATE:
                containerd.runtime.factory("init")
            elif kind == CACHE:
                stack.enter_context(Cache(containerd).server(1))
            found[kind] = containerd
        yield found


def _runtime(kind: str) -> Callable[[Path], runtimes.Runtime]:
    if kind == RUNC:
        return lambda _: runtimes.runc()
    return lambda directory: runtimes.kata(directory, template_path=directory / "template")


STARTS = {COLD: runtimes.Start.DIRECT, TEMPLATE: runtimes.Start.TEMPLATE, CACHE: runtimes.Start.CACHE}


# Memory


def memory_of(containerd: Containerd) -> dict[str, tuple[float, float]]:
    """Return RSS and PSS in MB (10^6 bytes) of the processes of all its pods, by program.

    A VM that only waits in a cache belongs to no pod.
    """
    listed = containerd.ctr("task", "ls").stdout.decode().splitlines()[1:]
    vmms = {int(line.split()[1]) for line in listed}
    found: dict[str, tuple[float, float]] = {}
    for process in processes_of(containerd.directory):
        program = program_of(process.argv)
        counts = program and (program != VMM or process.pid in vmms)
        sizes = smaps(process.pid) if counts else {}
        if sizes:
            rss, pss = found.get(program, (0.0, 0.0))
            found[program] = (rss + sizes["Rss"], pss + sizes["Pss"])
    return found


def program_of(argv: str) -> str:
    """Say which part of a pod a process is; empty if none."""
    if "containerd-shim" in argv:
        return SHIM
    command = argv.split(" ", 1)[0]
    return VIRTIOFSD if "virtiofsd" in command else VMM if "qemu-system" in command else ""


def smaps(pid: int) -> dict[str, float]:
    """Return a process's sums in MB (10^6 bytes); nothing if it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return {}
    lines = (line.split() for line in text.splitlines()[1:])
    return {words[0].rstrip(":"): int(words[1]) * 1024 / 1e6 for words in lines}


# Many at once


@dataclass(frozen=True, slots=True)
class AtOnce:
    """What came of pods that were started together."""

    failures: int
    seconds: float  # until all that did not fail had said something
    memory: float  # PSS of all their processes, in MB


def start_at_once(containerd: Containerd, count: int) -> AtOnce:
    """Start `count` pods, wait until all have printed, weigh them, and end them."""
    began = time.monotonic()
    clients = []
    for _ in range(count):
        arguments = containerd.run_arguments(
            "sh", "-c", "echo up; cat", container=containerd.new_id(), flags=["--rm"]
        )
        clients.append(containerd.popen(*arguments, stdin=subprocess.PIPE))
    up = []
    for client in clients:
        assert client.stdout is not None
        up.append(client.stdout.readline() == b"up\n")
    seconds = time.monotonic() - began
    memory = sum(pss for _, pss in memory_of(containerd).values())
    failures = 0
    for client, printed in zip(clients, up, strict=True):
        client.communicate(b"", timeout=AT_ONCE_TIMEOUT)
        failures += not printed or client.returncode != 0
    return AtOnce(failures, seconds, memory)
