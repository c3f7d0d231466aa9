"""A fault and the time until the host looked as before: each run leaves it in faults.json, beside the guest.

The time ends when nothing is left: no process, mount, socket, file, control group or descriptor. To look
takes some hundredths of a second, which is in it.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.harness import leaks
from tests.harness.containerd import Containerd, HarnessError
from tests.harness.runtimes import build


class Fault:
    """One fault under a name, on one containerd."""

    def __init__(self, containerd: Containerd, name: str) -> None:
        self._containerd = containerd
        self._name = name
        self._struck = 0.0

    def strikes(self) -> None:
        """Say that it happens now."""
        self._struck = time.monotonic()

    @contextmanager
    def cleaned(self, but: Callable[[str], bool] = lambda _: False) -> Iterator[None]:
        """Have a block after which the host must be as it was before. Raises: HarnessError."""
        before = leaks.snapshot(self._containerd)
        yield
        left = leaks.left_over(self._containerd, before, but=but)
        if left:
            raise HarnessError("left behind:\n" + "\n".join(left))
        assert self._struck, "the fault did not strike"
        _note(self._name, time.monotonic() - self._struck)


def _note(name: str, seconds: float) -> None:
    path = build() / "faults.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    times[name] = round(seconds, 2)
    path.write_text(json.dumps(times, indent=2, sort_keys=True) + "\n")
