"""A server that keeps VMs for the pods of a containerd, and what its log tells of each of them.

The rule: it lives as long as a block, whatever happens in the block. While it does, `leaks` does not count
the VMs that it has: they are its own, and come and go beside the pods.
"""

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.harness.containerd import TIMEOUT, Containerd

BEGUN = re.compile(r"VM (\w+) is being made ready")
READY = re.compile(r"VM (\w+) is ready after")
GONE = re.compile(r"VM (\w+) (?:was given away|died while it waited|was promised and not fetched)")
GIVEN = re.compile(r"VM (\w+) was given away")
INTERVAL = 0.05  # seconds


class Cache:
    """The server of a containerd, with the configuration that the runtime has when it starts."""

    def __init__(self, containerd: Containerd) -> None:
        self.containerd = containerd
        self.config = containerd.runtime.config
        self.endpoint = containerd.runtime.cache_endpoint
        self.log = containerd.directory / "cache.log"

    def factory(self, action: str) -> subprocess.CompletedProcess[str]:
        argv = ["kata-runtime", "--config", str(self.config), "factory", action]
        return subprocess.run(
            argv, capture_output=True, text=True, timeout=TIMEOUT, env=self.containerd.environ, check=False
        )

    @contextmanager
    def server(self, number: int) -> Iterator[subprocess.Popen[str]]:
        """Run one as long as the block lasts; begins when `number` VMs are ready."""
        argv = ["kata-runtime", "--config", str(self.config), "factory", "init"]
        with (
            self.log.open("w") as log,
            subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=log, text=True, env=self.containerd.environ
            ) as process,
        ):
            assert process.stdout is not None
            self.containerd.kept_vms = self.kept
            try:
                assert process.stdout.readline() == "vm factory initialized\n", self.log.read_text()
                self.wait_made(number)
                yield process
            finally:
                try:
                    process.terminate()
                    process.wait(TIMEOUT)
                except subprocess.TimeoutExpired:
                    process.kill()  # its VMs end with it; Popen reaps it
                    raise
                finally:
                    self.containerd.kept_vms = set

    def made(self) -> list[str]:
        return READY.findall(self.log.read_text())

    def wait_made(self, count: int) -> None:
        """Block until the server has made so many VMs since it began."""
        wait_until(lambda: len(self.made()) >= count, self.log.read_text)

    def kept(self) -> set[str]:
        """Return the VMs that nobody took, the one that is being made included."""
        log = self.log.read_text()
        return set(BEGUN.findall(log)) - set(GIVEN.findall(log))

    def wait_ready(self) -> None:
        """Block until a pod that asks is given a VM."""
        wait_until(self._is_ready, self.log.read_text)

    def _is_ready(self) -> bool:
        log = self.log.read_text()
        return bool(set(READY.findall(log)) - set(GONE.findall(log)))

    def waiting(self) -> list[int]:
        """Return the VMMs that the server has."""
        return [int(pid) for pid in re.findall(r"^VM pid = (\d+) ", self.factory("status").stdout, re.M)]


def wait_until(condition: Callable[[], object], explain: Callable[[], object] = str) -> None:
    """Look until `condition` holds: for what nothing announces."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(INTERVAL)
