"""Where the agent is, for the report of something that hangs: its threads, and the processes of the guest."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from agent.sandbox import Sandbox

MAX_PROCESSES = 256  # a guest can have very many, and a report is read by a human


def collect(sandbox: Sandbox) -> str:
    """Return a text of lines: threads with their places, containers, processes of ours, all processes."""
    return "\n".join([*_threads(), *_containers(sandbox), *_processes()])


def _threads() -> Iterator[str]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        places = []
        at: FrameType | None = frame
        while at is not None:
            places.append(f"{at.f_code.co_filename.rsplit('/', 1)[-1]}:{at.f_lineno}:{at.f_code.co_name}")
            at = at.f_back
        yield f"thread {names.get(ident, ident)}: {' < '.join(places)}"


def _containers(sandbox: Sandbox) -> Iterator[str]:
    for container in sandbox.containers():
        init = container.init
        yield f"container {container.id}: {container.state}, init {init.pid if init is not None else 'none'}"
    yield f"children: {sandbox.reaper.describe()}"


def _processes() -> Iterator[str]:
    pids = [name for name in os.listdir("/proc") if name.isdigit()]
    for pid in pids[:MAX_PROCESSES]:
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                name, _, rest = file.read().rpartition(")")
        except OSError:
            continue  # it has ended
        state, parent = rest.split()[:2]
        if parent != "2":  # the kernel's own threads
            yield f"process {name}) {state}, parent {parent}{_in_kernel(pid)}"


def _in_kernel(pid: str) -> str:
    """Return where the threads of a process are in the kernel, if that tells, and its signals and parents."""
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/stack", encoding="utf-8") as file:
                frames = [line.split()[-1].partition("+")[0] for line in file]
            found.append(f"{task}: {' < '.join(frames)}")
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            wanted = ("Sig", "Shd", "NSpid", "Tracer", "Threads")
            found += [" ".join(line.split()) for line in file if line.startswith(wanted)]
    except OSError:
        pass  # it has ended, or the kernel does not tell
    return "; ".join(["", *found])
