"""crun, which makes and changes containers in the guest: one function for each of its commands that we use.

crun's descriptors 0, 1, 2 become the container's, so its errors come through a log file. What it says is
passed up as it is: clients look for "executable file not found", "no such file or directory", "permission
denied".
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from agent.errors import RuntimeFailed
from agent.reaper import PATH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.reaper import Child, Reaper

MAX_LOG = 16 << 10
EXEC_FIFO = "exec.fifo"  # in crun's directory of a container: libcrun, status.c

# crun copies and re-executes itself before it enters a container, so that no container can write to its
# file (CVE-2019-5736). With this variable it asks first whether that lies on a read-only file system, as
# it does in our guest, and is content: libcrun, cloned_binary.c. To load crun once instead of twice saves
# a fifth of an exec.
ENVIRONMENT = {"PATH": PATH, "_LIBCONTAINER_CLONED_BINARY": "1"}


class Crun:
    """crun with its state in `root`."""

    def __init__(self, reaper: Reaper, root: str) -> None:
        self._reaper = reaper
        self._root = root

    def create(
        self, container_id: str, bundle: str, streams: Sequence[int], *, console: str | None, pivot: bool
    ) -> Child:
        """Make the container and its init process, which waits for `start`; returns that process.

        `streams` become its descriptors 0 to 2, unless `console` names the socket that its terminal is sent
        to.
        """
        pid_file = f"{bundle}/init.pid"
        argv = ["create", "--bundle", bundle, "--pid-file", pid_file]
        if console:
            argv += ["--console-socket", console]
        if not pivot:
            argv += ["--no-pivot"]
        return self._make([*argv, container_id], bundle, pid_file, streams)

    def exec(
        self,
        container_id: str,
        directory: str,
        process_file: str,
        streams: Sequence[int],
        *,
        console: str | None,
    ) -> Child:
        """Start a process in the container; returns it. `directory` is for files of this call alone."""
        pid_file = f"{directory}/pid"
        argv = ["exec", "--detach", "--process", process_file, "--pid-file", pid_file]
        if console:
            argv += ["--console-socket", console]
        return self._make([*argv, container_id], directory, pid_file, streams)

    def start(self, container_id: str) -> None:
        """Let the init process run its program; as with any OCI runtime, it may not do so yet on return.

        It waits until a byte comes through the fifo that `crun create` has left, and to write that is all
        that `crun start` does for a container without hooks (libcrun, status.c, write_exec_fifo). Loading
        crun for it costs twenty times as much. A crun that does it otherwise has no such fifo, or nobody
        reads it: then it is asked itself, and has the right words for what is wrong.
        """
        if not release(f"{self._root}/{container_id}/{EXEC_FIFO}"):
            self._run(["start", container_id])

    def update(self, container_id: str, resources_file: str) -> None:
        """Change the limits of the container."""
        self._run(["update", "--resources", resources_file, container_id])

    def pause(self, container_id: str) -> None:
        """Freeze all processes of the container."""
        self._run(["pause", container_id])

    def resume(self, container_id: str) -> None:
        """Let them go on."""
        self._run(["resume", container_id])

    def delete(self, container_id: str) -> None:
        """Kill what runs and remove the container's cgroup and crun's record of it. One that is unknown is
        fine.
        """
        self._run(["delete", "--force", container_id])

    def _run(self, argv: list[str]) -> None:
        command = ["crun", "--root", self._root, *argv]
        status, output = self._reaper.run(command, check=False, environment=ENVIRONMENT)
        if status:
            text = output.decode("utf-8", "replace").strip()
            raise RuntimeFailed(text or f"crun {argv[0]} ended with status {status}")

    def _make(self, argv: list[str], directory: str, pid_file: str, streams: Sequence[int]) -> Child:
        log_file = f"{directory}/crun.log"
        stdin, stdout, stderr = streams or (None, None, None)
        if os.path.exists(log_file):
            os.unlink(log_file)  # crun appends, and an older failure is none of this process's
        with self._reaper.births():
            crun = self._reaper.spawn(
                ["crun", "--root", self._root, "--log", f"file:{log_file}", *argv],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                environment=ENVIRONMENT,
            )
            status = crun.wait()
            if status:
                raise RuntimeFailed(_read(log_file).strip() or f"crun {argv[0]} ended with status {status}")
            child = self._reaper.adopt(int(_read(pid_file)))
        for file in (pid_file, log_file):
            _remove(file)
        return child


def release(fifo: str) -> bool:
    """Write to the fifo that an init process waits for; false if it does not wait there."""
    try:
        fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # there is no fifo, or nobody at its other end
        return False
    try:
        os.unlink(fifo)
        return os.write(fd, b"\0") == 1
    except OSError:
        return False
    finally:
        os.close(fd)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(MAX_LOG)
    except FileNotFoundError:
        return ""


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
