"""`delete`: containerd's second line of clean-up, after each normal deletion as well as after a crash.

So it nearly always finds nothing and says so quickly; every step takes "already gone" for success. It works
with the host's records alone, never with the guest. For a container of a pod it must not touch the pod, nor
a group's sandbox while the group has other members. The answer on standard output is a DeleteResponse: an
empty one would mean exit status 0.
"""

# pathlib costs 9 ms, and this runs after every container
# ruff: noqa: PTH109, PTH112, PTH208

import os
import time

from shim import address, bundle
from shim.args import Args

SERVER_GRACE = 2.5  # seconds for an orderly end, its last events included; containerd kills us after 5
KILL_WAIT = 0.5  # seconds until a killed process is gone
KILLED_STATUS = 137  # 128 + SIGKILL: what containerd is told of a task that ran when its shim died


def main(args: Args) -> int:
    """Clean up and print the answer."""
    directory = args.bundle or os.getcwd()
    pid = bundle.read_pid(directory, bundle.INIT_PID)
    sandbox = _ending_sandbox(directory, args.id)
    if sandbox:
        _end_server(directory, args)
        _clean_sandbox(directory, f"{args.namespace}--{sandbox}")
        _remove_socket(directory)
    _unmount(f"{directory}/rootfs")
    # Now nobody writes it any more.
    status, at = bundle.read_exit(directory) or (KILLED_STATUS, time.time())
    os.write(1, _answer(pid, status, at))
    return 0


def _ending_sandbox(directory: str, task_id: str) -> str:
    """Return the id of the sandbox that ends with this task, empty if none does."""
    try:
        group = bundle.read_group(directory, task_id)
    except bundle.BundleError:  # only the bundle of a sandbox ever got a serving process
        return task_id if bundle.read_pid(directory, bundle.SHIM_PID) else ""
    if group.kind == bundle.CONTAINER or (group.kind == bundle.MEMBER and _has_living_company(directory)):
        return ""
    return group.sandbox_id


def _has_living_company(directory: str) -> bool:
    """Say whether this task's server lives and serves others. Each has the server's address in its bundle."""
    path = bundle.read_file(directory, "address")
    if not path or not address.answers(path.removeprefix(address.SCHEME)):
        return False
    parent, own = os.path.split(os.path.normpath(directory))
    others = (name for name in os.listdir(parent) if name != own and not name.startswith("."))
    return any(bundle.read_file(f"{parent}/{name}", "address") == path for name in others)


def _end_server(directory: str, args: Args) -> None:
    """Let the serving process end in order, or kill it."""
    pid = bundle.read_pid(directory, bundle.SHIM_PID)
    if not pid:
        return
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return  # it has ended and is reaped
    try:
        # Read after the pidfd was opened: what it names now is what the pidfd means.
        if not _serves(pid, args):
            return
        import select
        import signal  # 3 ms for its enums

        for number, limit in ((signal.SIGTERM, SERVER_GRACE), (signal.SIGKILL, KILL_WAIT)):
            signal.pidfd_send_signal(handle, number)
            if select.select([handle], [], [], limit)[0]:
                return
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)


def _serves(pid: int, args: Args) -> bool:
    """Say whether a process is the server of this task: it kept the command line of its `start`."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return False
    return args.id.encode() in words and args.namespace.encode() in words


def _clean_sandbox(directory: str, sandbox_id: str) -> None:
    run_dir = bundle.read_file(directory, bundle.RUN_DIR)
    if not run_dir or not os.path.isdir(f"{run_dir}/sbs/{sandbox_id}"):
        return
    from pathlib import Path

    from vc.cleanup import cleanup_sandbox

    cleanup_sandbox(sandbox_id, Path(run_dir))


def _remove_socket(directory: str) -> None:
    path = bundle.read_file(directory, "address").removeprefix(address.SCHEME)
    if path.startswith("/") and os.path.lexists(path) and not address.answers(path):
        address.remove(path)


def _unmount(rootfs: str) -> None:
    if _is_mounted(rootfs):
        from shim import kernel

        kernel.unmount_all(rootfs)


def _is_mounted(path: str) -> bool:
    """Say whether something is mounted on `path`, which nothing is after a normal end: ctypes costs 5 ms."""
    for char in ("\\", " ", "\t", "\n"):  # Linux, fs/proc_namespace.c, mangle()
        path = path.replace(char, f"\\{ord(char):03o}")
    with open("/proc/self/mountinfo", "rb") as file:
        return f" {path} ".encode(errors="surrogateescape") in file.read()


def _answer(pid: int, status: int, at: float) -> bytes:
    """Return a DeleteResponse: protobuf would cost as much time as all the rest.

    `at` is in seconds since the epoch. Source of the field numbers: task.proto, DeleteResponse, and
    google/protobuf/timestamp.proto.
    """
    seconds, nanos = divmod(round(at * 1e9), 10**9)
    exited_at = _field(1, seconds) + _field(2, nanos)
    return _field(1, pid) + _field(2, status) + b"\x1a" + _varint(len(exited_at)) + exited_at


def _field(number: int, value: int) -> bytes:
    return bytes([number << 3]) + _varint(value)


def _varint(value: int) -> bytes:
    data = b""
    while value > 0x7F:
        data, value = data + bytes([value & 0x7F | 0x80]), value >> 7
    return data + bytes([value])
