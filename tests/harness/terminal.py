"""A real terminal: the client has it as its controlling terminal, the test sits at the other end."""

import fcntl
import os
import re
import select
import struct
import subprocess
import termios
import time
from types import TracebackType

from tests.harness.containerd import Containerd, HarnessError
from tests.harness.evidence import threads_below


class Terminal:
    """Runs `ctr ARGS` in a terminal of `rows` x `columns`."""

    def __init__(self, containerd: Containerd, *args: str, rows: int = 24, columns: int = 80) -> None:
        self._master, slave = os.openpty()
        self.output = b""
        self._directory = containerd.directory
        self.resize(rows, columns)
        # setsid makes the terminal the controlling one, so that a change of size is a signal to ctr.
        self._client = subprocess.Popen(
            ["setsid", "--ctty", "ctr", *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=containerd.environ,
        )
        os.close(slave)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._client.poll() is None:
            self._client.kill()
        self._client.wait()
        os.close(self._master)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, pattern: str, timeout: float = 30.0) -> re.Match[bytes]:
        """Read until `pattern` appears; what was read up to its end is not looked at again."""
        deadline = time.monotonic() + timeout
        while (match := re.search(pattern.encode(), self.output)) is None:
            if not self._read(deadline):
                where = threads_below(self._directory)  # while the client is still there
                raise HarnessError(f"no {pattern!r} within {timeout} s in {self.output!r}\n{where}")
        self.output = self.output[match.end() :]
        return match

    def wait(self, timeout: float = 30.0) -> int:
        """Read to the end; return the client's exit status."""
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            pass
        try:
            return self._client.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise HarnessError(f"no end within {timeout} s, output {self.output!r}") from None

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: the last user of the other end is gone
            return False
        self.output += data
        return bool(data)
