"""What process 1 of a guest does before it serves, and how the guest ends.

The kernel hands over a read-only root and, from the initrd, a /dev; everything else is made here, in the
order in which later steps need it.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

from agent import log

if TYPE_CHECKING:
    from collections.abc import Mapping

# (source and type, target, options); what is mounted already stays as it is
MOUNTS = (
    ("proc", "/proc", "nosuid,nodev,noexec"),
    ("sysfs", "/sys", "nosuid,nodev,noexec"),
    ("devtmpfs", "/dev", "nosuid"),
    ("devpts", "/dev/pts", "nosuid,noexec,gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", "nosuid,nodev,mode=1777"),  # noqa: S108
    ("tmpfs", "/run", "nosuid,nodev,mode=755"),
    ("tmpfs", "/tmp", "nosuid,nodev,mode=1777"),  # noqa: S108
    ("cgroup2", "/sys/fs/cgroup", "nosuid,nodev,noexec,nsdelegate"),
)
LINKS = (
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
)
MAX_FILES = 1 << 20  # the kernel's own upper limit (fs.nr_open), for containers that ask for many

SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914  # linux/sockios.h
IFF_UP = 1  # linux/if.h
RLIMIT_NOFILE = 7  # asm-generic/resource.h


def prepare() -> dict[str, str]:
    """Make the guest a system that programs can run in; returns the parameters of its kernel command line.

    A step that fails is logged and the next one tried: an agent that serves can tell what is wrong.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", os.O_RDWR)  # the lowest free number, which is this one
    _mount_all()
    parameters = read_command_line()
    log.set_output(_console())
    if level := parameters.get("agent.log"):
        log.set_level(level)
    for step in (_links, _controllers, _loopback, _hostname, _limits):
        try:
            step()
        except OSError as exc:
            log.warning("start-up step failed", step=step.__name__, error=exc)
    os.environ.setdefault("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
    return parameters


def parse_command_line(text: str) -> dict[str, str]:
    """Return the parameters of a kernel command line; one without a value has an empty one. The last one
    wins.
    """
    words: list[str] = []
    quoted = False
    for character in text.strip() + " ":  # quotes keep blanks together: kernel/params.c, next_arg
        if character == '"':
            quoted = not quoted
        elif character.isspace() and not quoted:
            words.append("")
            continue
        if not words:
            words.append("")
        if character != '"':
            words[-1] += character
    return {name: value for name, _, value in (word.partition("=") for word in words if word)}


def read_command_line() -> dict[str, str]:
    """Return the parameters that this guest was started with."""
    with open("/proc/cmdline", encoding="utf-8", errors="replace") as file:
        return parse_command_line(file.read())


def number(parameters: Mapping[str, str], name: str, default: float) -> float:
    """Return a parameter that is a number; the default if it is missing or none."""
    try:
        return float(parameters[name])
    except (KeyError, ValueError):
        return default


def _mount_all() -> None:
    from agent import syscalls
    from agent.mounts import parse_options

    for fstype, target, text in MOUNTS:
        options = parse_options(text.split(","))
        try:
            if os.path.ismount(target):
                continue
            os.makedirs(target, exist_ok=True)
            syscalls.mount(fstype, target, fstype, options.flags, options.data)
        except OSError as exc:
            if exc.errno != errno.EBUSY:
                log.error("cannot mount", target=target, error=exc)


def _console() -> int:
    try:
        return os.open("/dev/console", os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return 2


def _links() -> None:
    for target, path in LINKS:
        try:
            os.symlink(target, path)
        except FileExistsError:
            pass


def _controllers() -> None:
    """Let cgroups below the root have every controller there is."""
    root = "/sys/fs/cgroup"
    with open(f"{root}/cgroup.controllers", encoding="utf-8") as file:
        names = file.read().split()
    for name in names:  # one by one: if one cannot be had, the others can
        try:
            with open(f"{root}/cgroup.subtree_control", "w", encoding="utf-8") as file:
                file.write(f"+{name}")
        except OSError as exc:
            log.debug("controller not available", controller=name, error=exc)


def _loopback() -> None:
    import _socket
    import fcntl

    channel = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    request = struct.pack("16sh14x", b"lo", 0)  # struct ifreq: netdevice(7)
    _, flags = struct.unpack("16sh14x", fcntl.ioctl(channel.fileno(), SIOCGIFFLAGS, request))
    fcntl.ioctl(channel.fileno(), SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))
    channel.close()


def _hostname() -> None:
    import _socket

    try:
        with open("/etc/hostname", encoding="utf-8") as file:
            _socket.sethostname(file.read().strip())
    except FileNotFoundError:
        pass


def _limits() -> None:
    from agent import syscalls

    syscalls.set_limit(RLIMIT_NOFILE, MAX_FILES)


def power_off() -> None:
    """Write everything to the disks and turn the machine off."""
    from agent import syscalls

    os.sync()
    syscalls.power_off()
