"""The parent of a VMM that may change its owner. Run as a script, never imported.

The parent-death signal ties a process to its parent and to nobody else, so a VMM that is to die with whoever
owns it, and can be handed over, needs a parent of its own. This is it. The owner holds one end of a socket
pair, the *lease*, and this process the other one; the owner's end can be passed on like any descriptor. When
it is closed everywhere, because the last owner let go of it or died in whatever way, the VMM is killed. When
the VMM ends first, the owner reads its status from the lease. When this process is killed, the VMM dies by
the parent-death signal.

    keeper -> owner    the VMM's process id in decimal, with its pidfd; or the text of an error
    keeper -> owner    its exit status in decimal, as in subprocess: negative after a signal

One such process runs beside each VMM for hours, so the rule: it imports nothing but `os` and what the
interpreter has built in, and it is started without the site module. That is 3 MB instead of 7.

usage: keeper.py LEASE NAME, with the words to be run coming as the first message of the lease, each ended by
a zero byte: first a directory that is removed when the owner is gone (unless it was renamed), then the argv.
"""

import _socket  # what is left of `socket` without its imports
import os
import select
import sys

SIGKILL = 9  # signal(7); the module `signal` would import much more
MAX_WORDS = 1 << 17  # bytes: a command line, MAX_ARG_STRLEN of execve(2)
LAST_STDIO = 2


def main() -> int:
    """Start the VMM, and keep it as long as somebody holds the lease."""
    lease = _socket.socket(fileno=int(sys.argv[1]))
    lease_fd = lease.fileno()
    os.set_inheritable(lease_fd, False)  # noqa: FBT003 - it has no name
    words = os.fsdecode(lease.recv(MAX_WORDS)).split("\0")[:-1]
    if not words or os.fork():
        return 0  # it belongs to no process: its next owner could not reap it
    directory, *argv = words
    try:
        pid = os.posix_spawnp(argv[0], argv, os.environ, setsid=True)
    except OSError as exc:
        lease.send(f"{argv[0]}: {exc.strerror}; is it installed?".encode())
        return 1
    pidfd = os.pidfd_open(pid)
    # What was the VMM's is the VMM's alone: its stderr must end with it, and its sockets.
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(LAST_STDIO + 1):
        os.dup2(null, descriptor)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > LAST_STDIO and int(name) not in (lease_fd, pidfd):
            close(int(name))
    rights = pidfd.to_bytes(4, sys.byteorder)  # an int: cmsg(3)
    lease.sendmsg([str(pid).encode()], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
    poll = select.poll()
    poll.register(lease_fd, select.POLLIN)
    poll.register(pidfd, select.POLLIN)
    let_go = all(descriptor != pidfd for descriptor, _ in poll.poll())
    if let_go:
        os.kill(pid, SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if let_go:
        remove(directory)
    else:
        send(lease, str(status))
    return 0


def close(descriptor: int) -> None:
    """Close a descriptor that may be closed already."""
    try:
        os.close(descriptor)
    except OSError:
        pass


def send(lease: _socket.socket, text: str) -> None:
    """Tell the owner, if there still is one."""
    try:
        lease.send(text.encode())
    except OSError:
        pass


def remove(directory: str) -> None:
    """Remove the VM's directory, which nobody else would do if its owner was killed."""
    try:
        for name in os.listdir(directory):
            os.unlink(f"{directory}/{name}")
        os.rmdir(directory)
    except OSError:
        pass  # renamed by the next owner, or removed by the last one


if __name__ == "__main__":
    sys.exit(main())
