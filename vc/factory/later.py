"""Having a template made by a process of its own, that outlives the pod and gets out of everybody's way.

The process is `kata-runtime factory init --background`. It inherits nothing but the environment, and runs
only when no other process wants the processor. It takes the lock of the templates or ends at once, so there
is never more than one.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import trio

log = logging.getLogger(__name__)

PROGRAM = "kata-runtime"
DELAY = 2.0  # seconds that a pod is given for its own start


def maker_command(config_path: Path) -> list[str] | None:
    """Return the command that makes a template; None if the program is not installed."""
    beside_us = Path(sys.argv[0]).with_name(PROGRAM)
    program = shutil.which(str(beside_us)) or shutil.which(PROGRAM)
    if program is None:
        return None
    return [program, "--config", str(config_path), "factory", "init", "--background"]


class Later:
    """Asks for a template once: some time after a boot, or when the VM ends earlier."""

    def __init__(self, config_path: Path) -> None:
        self._config_path = config_path
        self._asked = False

    def ask(self) -> subprocess.Popen[bytes] | None:
        """Start the process. Safe to call twice."""
        if self._asked:
            return None
        self._asked = True
        command = maker_command(self._config_path)
        if command is None:
            log.info("no template is made: the program %s is not installed", PROGRAM)
            return None
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # its failure is noted beside the templates
                cwd="/",
                start_new_session=True,
            )
        except OSError as exc:
            log.info("no template is made: %s: %s", command[0], exc.strerror)
            return None

    def ask_and_leave(self) -> None:
        """Start the process, and let whoever reaps orphans have it."""
        _leave(self.ask())

    async def run(self) -> None:
        """Start the process after the delay, and reap it if it ends while we run."""
        await trio.sleep(DELAY)
        process = self.ask()
        if process is None:
            return
        try:
            pidfd = os.pidfd_open(process.pid)
            try:
                await trio.lowlevel.wait_readable(pidfd)
            finally:
                os.close(pidfd)
            process.poll()
        finally:
            _leave(process)


def _leave(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None and process.poll() is None:
        process.returncode = 0  # it is meant to live on; without this, Popen warns
