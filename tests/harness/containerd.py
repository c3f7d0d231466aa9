"""A containerd of our own, and its client.

Everything it makes lies in one temporary directory, under one random containerd namespace, and every process
below it carries the directory in its environment. So two harnesses, or one beside the machine's own
containerd, never meet, what is left over can be told from what is not ours, and the end kills nothing else.
"""

import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from tests.harness.evidence import threads_below
from tests.harness.image import IMAGE, build_image
from tests.harness.processes import MARK, kill, processes_of
from tests.harness.runtimes import Runtime

# A machine that emulates its guests needs some seconds for a boot: a minute is a hang.
TIMEOUT = 60.0
STOP_TIMEOUT = 15.0
DUMP_SECONDS = 3.0  # for the shims to say where they are
STATUS_INTERVAL = 0.05  # seconds

# The CRI plugin's service is off, but not its parts: without them 2.x serves no sandboxes to clients.
CONFIG = """\
version = {version}
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "{directory}/containerd.sock"
[debug]
  level = "{level}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{directory}/opt"
"""


class HarnessError(Exception):
    """A command did not do what the test needs; the text holds its output and the end of containerd's log."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended."""

    argv: Sequence[str]
    exit_status: int
    stdout: bytes
    stderr: bytes

    def __str__(self) -> str:
        return (
            f"{' '.join(self.argv)}\nexit status {self.exit_status}\n"
            f"stdout: {self.stdout[-4000:]!r}\nstderr: {self.stderr[-4000:]!r}"
        )


class Containerd:
    """A running containerd with the busybox image; use it as a context manager."""

    def __init__(
        self, runtime: Callable[[Path], Runtime], *, level: str = "debug", programs: Path | None = None
    ) -> None:
        """Take daemon, client and so on from the directory `programs`, by default from those on PATH."""
        self.directory = Path(tempfile.mkdtemp(prefix="kata-"))
        self.namespace = f"t-{secrets.token_hex(4)}"
        self.runtime = runtime(self.directory)
        self.log_path = self.directory / "containerd.log"
        self.ids: list[str] = []  # of all containers that were ever asked for
        self.kept_vms: Callable[[], set[str]] = set  # those that no pod has: a cache's
        self._level = level
        self._programs = programs
        self._daemon: subprocess.Popen[bytes] | None = None
        self._snapshotter = "overlayfs"

    def __enter__(self) -> "Containerd":
        try:
            self.open()
            self.import_image()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Start the daemon with a configuration of its own. The caller calls close(), also if this fails."""
        for name in ("fifo", "tmp"):
            (self.directory / name).mkdir()
        # Version 3 came with containerd 2.0, which also reads 2; 1.7 refuses it (containerd: docs/ops.md).
        version = 3 if self.version()[0] >= 2 else 2
        config = CONFIG.format(directory=self.directory, level=self._level, version=version)
        (self.directory / "config.toml").write_text(config)
        self.start_daemon()
        self._snapshotter = self._pick_snapshotter()

    def version(self) -> tuple[int, ...]:
        """Return the version of the daemon's program, as in (1, 7, 24)."""
        argv = ["containerd", "--version"]
        said = subprocess.run(argv, env=self.environ, capture_output=True, text=True, check=False)
        match = re.search(r" v?(\d+)\.(\d+)\.(\d+)", said.stdout)
        if match is None or said.returncode != 0:
            raise HarnessError(f"containerd --version: {said}")
        return tuple(int(part) for part in match.groups())

    def import_image(self) -> None:
        """Build the busybox image and give it to the daemon."""
        archive = self.directory / "tmp" / "image.tar"
        build_image(archive)
        self.ctr("image", "import", str(archive))
        archive.unlink()

    @property
    def address(self) -> str:
        return f"{self.directory}/containerd.sock"

    @property
    def daemon_pid(self) -> int:
        assert self._daemon is not None
        return self._daemon.pid

    @property
    def environ(self) -> Mapping[str, str]:
        """The environment of the daemon and of its clients."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("KATA_")}
        path = {**inherited, **self.runtime.environ}["PATH"]
        return {
            **inherited,
            **self.runtime.environ,
            "PATH": path if self._programs is None else f"{self._programs}:{path}",
            MARK: str(self.directory),
            "TMPDIR": f"{self.directory}/tmp",
            "CONTAINERD_ADDRESS": self.address,
            "CONTAINERD_NAMESPACE": self.namespace,
            "CONTAINERD_SNAPSHOTTER": self._snapshotter,
        }

    def start_daemon(self) -> None:
        """Start the daemon, again after stop_daemon(), and return when it answers."""
        address = self.directory / "ready.sock"
        # It tells a service manager when it is ready (sd_notify(3)); a client of 2.x does not wait for it.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, self.log_path.open("ab") as log:
            ready.bind(str(address))
            try:
                self._daemon = subprocess.Popen(
                    ["containerd", "--config", f"{self.directory}/config.toml"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**self.environ, "NOTIFY_SOCKET": str(address)},
                    cwd=self.directory,
                    start_new_session=True,
                )
                self._wait_ready(ready)
            finally:
                address.unlink()

    def _wait_ready(self, ready: socket.socket) -> None:
        dead = os.pidfd_open(self.daemon_pid)
        try:
            while dead not in (readable := select.select([ready.fileno(), dead], [], [], TIMEOUT)[0]):
                if not readable:
                    raise HarnessError(f"containerd is not ready after {TIMEOUT} s:\n{self.log_since(0)}")
                if b"READY=1" in ready.recv(4096).split(b"\n"):
                    return
        finally:
            os.close(dead)
        raise HarnessError(f"containerd ended at once:\n{self.log_since(0)}")

    def stop_daemon(self, *, kill: bool = False) -> None:
        """End the daemon alone: shims and their containers live on."""
        if self._daemon is None:
            return
        if kill:
            self._daemon.kill()
        else:
            self._daemon.terminate()
        try:
            self._daemon.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            self._daemon.wait()
        self._daemon = None

    def close(self) -> None:
        """End everything below this harness and remove its directory. Safe to call twice."""
        with suppress(HarnessError, OSError):
            self.remove_all()
        self.stop_daemon()
        for process in list(processes_of(self.directory)):
            kill(process)
        self._unmount_all()
        self._remove_cgroups()
        shutil.rmtree(self.directory, ignore_errors=True)

    def log_size(self) -> int:
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    def log_since(self, offset: int, limit: int = 30_000) -> str:
        """Return the log of containerd and of the shims from `offset` on, its end if it is too long."""
        if not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as log:
            log.seek(max(offset, self.log_size() - limit))
            return log.read().decode(errors="replace")

    # The client.

    def popen(
        self, *args: str, stdin: int | IO[bytes] | None = subprocess.DEVNULL, stdout: int = subprocess.PIPE
    ) -> subprocess.Popen[bytes]:
        """Start `ctr ARGS`; the caller waits for it."""
        return subprocess.Popen(
            ["ctr", *args], stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, env=self.environ
        )

    def dump_shims(self) -> None:
        """Have our shims write into the log where they are: somebody waits for one of them in vain."""
        for process in processes_of(self.directory):
            if "containerd-shim-kata" in process.argv:
                os.kill(process.pid, signal.SIGUSR1)
                os.kill(process.pid, signal.SIGUSR2)
        time.sleep(DUMP_SECONDS)  # nothing tells when the last line is written

    def ctr(
        self, *args: str, stdin: bytes | None = None, timeout: float = TIMEOUT, check: bool = True
    ) -> Result:
        """Run `ctr ARGS` to its end.

        Raises:
            HarnessError: it did not end in time, or failed although `check`.

        """
        client = self.popen(*args, stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE)
        try:
            stdout, stderr = client.communicate(stdin, timeout)
        except subprocess.TimeoutExpired:
            mine = threads_below(self.directory)
            self.dump_shims()
            client.kill()
            stdout, stderr = client.communicate()
            result = Result(["ctr", *args], client.returncode, stdout, stderr)
            raise HarnessError(
                f"no end after {timeout} s:\n{result}\nprocesses:\n{mine}\n{self.log_since(0, 3000)}"
            ) from None
        result = Result(["ctr", *args], client.returncode, stdout, stderr)
        if check and result.exit_status != 0:
            raise HarnessError(f"{result}\n{self.log_since(0, 3000)}")
        return result

    def program(self, *argv: str, timeout: float = TIMEOUT) -> Result:
        """Run another program than the client, in the daemon's environment. Raises: HarnessError."""
        done = subprocess.run(argv, env=self.environ, capture_output=True, timeout=timeout, check=False)
        result = Result(argv, done.returncode, done.stdout, done.stderr)
        if result.exit_status != 0:
            raise HarnessError(str(result))
        return result

    def new_id(self, prefix: str = "c") -> str:
        container = f"{prefix}-{secrets.token_hex(4)}"
        self.ids.append(container)
        return container

    def run_arguments(self, *command: str, container: str, flags: Sequence[str] = ()) -> list[str]:
        """Return the arguments of `ctr run` for the image."""
        fixed = ["run", "--runtime", self.runtime.name, "--fifo-dir", f"{self.directory}/fifo"]
        return [*fixed, *flags, IMAGE, container, *command]

    def run(
        self,
        *command: str,
        container: str | None = None,
        flags: Sequence[str] = (),
        stdin: bytes | None = None,
        timeout: float = TIMEOUT,
    ) -> Result:
        """Run a container to its end and remove it, whatever its exit status."""
        container = container or self.new_id()
        arguments = self.run_arguments(*command, container=container, flags=["--rm", *flags])
        return self.ctr(*arguments, stdin=stdin, timeout=timeout, check=False)

    @contextmanager
    def running(self, *command: str, flags: Sequence[str] = ()) -> Iterator[str]:
        """Start a container in the background, by default one that sleeps; yield its id; remove it."""
        container = self.new_id("bg")
        # Its init process must die of SIGTERM like any other, which sleep as pid 1 would ignore.
        command = command or ("sh", "-c", "trap 'exit 143' TERM; while :; do sleep 1000 & wait $!; done")
        try:
            self.ctr(*self.run_arguments(*command, container=container, flags=["--detach", *flags]))
            yield container
        finally:
            self.remove(container)

    def exec_arguments(self, container: str, *command: str, flags: Sequence[str] = ()) -> list[str]:
        fixed = ["task", "exec", "--fifo-dir", f"{self.directory}/fifo"]
        if "--exec-id" not in flags:
            fixed += ["--exec-id", f"e-{secrets.token_hex(6)}"]
        return [*fixed, *flags, container, *command]

    def exec(
        self,
        container: str,
        *command: str,
        flags: Sequence[str] = (),
        stdin: bytes | None = None,
        timeout: float = TIMEOUT,
    ) -> Result:
        """Run a process in a running container to its end, whatever its exit status."""
        arguments = self.exec_arguments(container, *command, flags=flags)
        return self.ctr(*arguments, stdin=stdin, timeout=timeout, check=False)

    def task_status(self, container: str) -> str | None:
        """Return RUNNING, STOPPED, PAUSED and so on, or None if there is no such task."""
        for line in self.ctr("task", "ls").stdout.decode().splitlines()[1:]:
            name, _pid, status = line.split()
            if name == container:
                return status
        return None

    def wait_status(self, container: str, *wanted: str | None) -> str | None:
        """Wait until the task has one of these states, for which nothing but events tells; return it.

        Raises:
            HarnessError: it has another one for TIMEOUT; the log holds what the shims did then.

        """
        deadline = time.monotonic() + TIMEOUT
        while (status := self.task_status(container)) not in wanted:
            if time.monotonic() > deadline:
                self.dump_shims()
                raise HarnessError(
                    f"{container} is {status} and not one of {wanted} after {TIMEOUT} s:\n"
                    f"{threads_below(self.directory)}\n{self.log_since(0, 6000)}"
                )
            time.sleep(STATUS_INTERVAL)
        return status

    def task_pid(self, container: str) -> int:
        for line in self.ctr("task", "ls").stdout.decode().splitlines()[1:]:
            name, pid, _status = line.split()
            if name == container:
                return int(pid)
        raise HarnessError(f"no task {container!r}")

    def delete_task(self, container: str, *flags: str) -> int:
        """Delete the task, which must succeed; return the exit status that it had."""
        warning = self.ctr("task", "rm", *flags, container).stderr.decode()
        match = re.search(r"non-zero exit code (\d+)", warning)  # `ctr` tells it in no other way
        return int(match[1]) if match else 0

    def remove(self, container: str) -> None:
        """Kill and delete a container, in whatever state it is."""
        self.ctr("task", "rm", "--force", container, check=False)
        self.ctr("container", "rm", container, check=False)

    def remove_all(self) -> None:
        if self._daemon is None or self._daemon.poll() is not None:
            return
        for container in self.ctr("container", "ls", "--quiet", timeout=5.0).stdout.decode().split():
            self.ctr("task", "rm", "--force", container, check=False, timeout=10.0)
            self.ctr("container", "rm", container, check=False, timeout=5.0)

    def _pick_snapshotter(self) -> str:
        """Overlayfs needs a file system under it that can carry one; the native snapshotter runs anywhere."""
        for line in self.ctr("plugins", "ls").stdout.decode().splitlines():
            if line.split()[1:2] == ["overlayfs"] and line.split()[-1] == "ok":
                return "overlayfs"
        return "native"

    def _unmount_all(self) -> None:
        with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
            targets = [line.split()[4] for line in mounts]
        for target in reversed([name for name in targets if name.startswith(f"{self.directory}/")]):
            subprocess.run(["umount", "--lazy", target], check=False, capture_output=True)

    def _remove_cgroups(self) -> None:
        for group in cgroups_of(self.namespace):
            with suppress(OSError):
                group.rmdir()


def cgroups_of(namespace: str) -> list[Path]:
    """Return the control groups of a containerd namespace, the deepest first."""
    found = []
    for directory, names, _ in os.walk("/sys/fs/cgroup", topdown=False):
        found += [Path(directory, name) for name in names if namespace in f"{directory}/{name}"]
    return found
