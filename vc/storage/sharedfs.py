"""virtiofsd: the process that shows a directory of the host to the guest.

There are two programs of that name. QEMU's own, in C, came with it up to 7.2; the one in Rust followed it.
They do the same and want other words. `command_line` is pure and knows both; `virtiofsd` runs one.

virtiofsd reads requests from the guest's memory, so it is as exposed as QEMU. It puts itself into
namespaces where the shared directory is the root, drops capabilities and filters system calls, both
programs by default. A file that the guest has looked up costs a descriptor, so it is started with the limit
of open files raised as far as that may be.

Mounts that appear below the directory later appear in virtiofsd's namespace by propagation, for which the
directory must be a slave or shared mount; announcing them tells the guest where one begins, without which two
mounts with equal inode numbers would be one file to it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from enum import Enum
from functools import lru_cache
from pathlib import Path

import trio

from vc.errors import HypervisorError
from vc.hypervisor.base import SharedFSConfig, VirtioFS
from vc.hypervisor.children import Child, descendants, prefix, running
from vc.pids import kill
from vc.unixsock import listen

TAG = "kataShared"  # Kata's name of the share, by which the agent mounts it
ASK_TIMEOUT = 5.0  # seconds for `virtiofsd --version`
EXIT_GRACE = 2.0  # seconds to end by itself when QEMU has hung up

SOCKET = "virtiofs.sock"
SHARED_LINK = "shared"
THROUGH_LINK = "/."  # the C program refuses a path that ends in a symbolic link


class Flavour(Enum):
    """Which of the two programs."""

    C = "C"
    RUST = "Rust"


def flavour_of(version: str) -> Flavour:
    """Tell the program by what `--version` prints: "virtiofsd version 7.2.22", or "virtiofsd 1.10.0"."""
    return Flavour.C if re.search(r"virtiofsd version [0-9]|QEMU", version) else Flavour.RUST


def command_line(config: SharedFSConfig, flavour: Flavour, *, directory: Path, descriptor: int) -> list[str]:
    """Return virtiofsd's argv; it accepts one connection on the listening socket `descriptor`."""
    argv = [str(config.daemon), f"--fd={descriptor}"]
    if flavour is Flavour.RUST:
        argv += [
            "--shared-dir",
            f"{directory}{THROUGH_LINK}",
            "--cache",
            config.cache,
            "--sandbox",
            "namespace",
        ]
        argv += ["--announce-submounts"]
    else:
        # Its options are separated by commas, and a backslash takes the meaning from the next character: the
        # parser is libfuse's, fuse_opt.c.
        source = re.sub(r"([\\,])", r"\\\1", f"{directory}{THROUGH_LINK}")
        # This one calls it "none", and has nothing between that and "auto".
        cache = {"never": "none", "metadata": "none"}.get(config.cache, config.cache)
        argv += ["-o", f"source={source},cache={cache},sandbox=namespace,announce_submounts"]
        argv += ["-o", "no_posix_lock"]  # the answer to a blocking lock would block a thread of the pool
    # Ours first: in both programs the last one of an option counts.
    return [*argv, *config.extra_args]


async def ask_flavour(daemon: Path) -> Flavour:
    """Find out which program this is; asked once for each file."""
    try:
        stat = daemon.stat()
    except OSError as exc:
        raise HypervisorError(f"virtio_fs_daemon {daemon}: {exc.strerror}; is it installed?") from exc
    if daemon == Path("/usr/lib/qemu/virtiofsd"):  # QEMU never shipped the other one
        return Flavour.C
    return await trio.to_thread.run_sync(_ask_flavour, daemon, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _ask_flavour(daemon: Path, _mtime_ns: int) -> Flavour:
    try:
        done = subprocess.run(
            [str(daemon), "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ASK_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise HypervisorError(f"virtio_fs_daemon {daemon}: `--version` failed: {exc}") from exc
    return flavour_of(done.stdout.decode("utf-8", "replace"))


class SharedFS:
    """A virtiofsd that runs. `device` is what a machine plugs."""

    def __init__(self, child: Child, device: VirtioFS) -> None:
        self.device = device
        self.pid = child.pid
        self._child = child

    @property
    def failed(self) -> bool:
        """Whether it has ended by an error. When the VMM ends, it ends in order."""
        return bool(self._child.exit_status)

    async def wait_dead(self) -> str:
        """Block until virtiofsd has ended; return the cause. The guest's files are gone with it."""
        return await self._child.wait_dead()


@asynccontextmanager
async def virtiofsd(config: SharedFSConfig, shared_dir: Path, socket_path: Path) -> AsyncIterator[SharedFS]:
    """Share `shared_dir` at `socket_path` as long as the block lasts. Connections wait until it is up.

    Leave the block when the VMM is dead: virtiofsd ends by itself then, and is killed only if it does not.

    Raises:
        HypervisorError: it cannot be started. That it ends soon after is told by `wait_dead`.

    """
    flavour = await ask_flavour(config.daemon)
    # The path that virtiofsd sees lies beside its socket, so that /proc/*/cmdline tells whose process it is.
    link = socket_path.parent / SHARED_LINK
    try:
        link.symlink_to(shared_dir)
        listener = listen(socket_path)
    except OSError as exc:
        raise HypervisorError(f"cannot prepare {socket_path} for virtiofsd: {exc.strerror}") from exc
    with ExitStack() as handed_over:
        handed_over.enter_context(listener)
        argv = prefix(capabilities=True)  # to act as any user for the guest; it drops the others itself
        argv += command_line(config, flavour, directory=link, descriptor=listener.fileno())
        async with running(argv, name="virtiofsd", pass_fds=[listener.fileno()]) as child:
            handed_over.close()  # or a connection to a dead virtiofsd would wait for ever
            try:
                yield SharedFS(child, VirtioFS(socket_path, TAG, config.queue_size))
            finally:
                await _end(child)


async def _end(child: Child) -> None:
    """Let it end by itself, or kill it with its own children: it serves from a process in a PID namespace."""
    with trio.move_on_after(EXIT_GRACE, shield=True) as scope:
        await child.wait_dead()
    if scope.cancelled_caught:
        for pid in descendants(child.pid):
            kill(pid, lambda pid=pid: pid in descendants(child.pid))  # type: ignore[misc]
