"""What there is to see of processes that hang: where each of their threads is."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.harness.processes import processes_of


def threads_below(directory: Path) -> str:
    """Say what the threads of a harness's processes do: name, state, place in the kernel, system call."""
    return "\n".join(
        line for process in processes_of(directory) for line in _process(process.pid, str(process))
    )


def _process(pid: int, title: str) -> Iterator[str]:
    yield title
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with suppress(OSError):
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            words = [_read(task / name) for name in ("comm", "wchan", "syscall")]
            yield f"    {task.name} {state} {' '.join(words)}"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "?"  # a kernel that does not tell
