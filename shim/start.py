"""`start`: make sure that the pod has a serving process, and print its address.

This is on the path of every pod, so the order is: listen, fork, print, exit; everything heavy is imported by
the fork while containerd already dials the socket. containerd takes all of stdout and stderr up to their end
for the address, so nothing else may ever be written there, and the server must not keep either open.

Undo is in reverse order: whatever fails, no process, no socket and no file of ours is left.
"""

# pathlib costs 9 ms
# ruff: noqa: PTH109, PTH119, PTH120

import os
import stat
import time

from shim import address, bootstrap, bundle
from shim.args import Args

BEGAN = time.monotonic()  # of everything that is told about the duration of a start
SIGKILL = 9  # signal(7); the module signal costs 3 ms for its enums
# containerd 2.x: the plugin's id names the directory of its bundles, <state>/<plugin>/<namespace>/<id>.
SANDBOX_CONTROLLER = "io.containerd.sandbox.controller.v1.shim"
OOM_SCORE_MIN, OOM_SCORE_MAX = -1000, 1000  # linux/oom.h


def start(args: Args) -> str:
    """Return what containerd is to read: where the pod's server is, which is started if need be.

    The fork never returns from here.

    Raises:
        OSError, AddressError, BundleError, StartError: there is no server; the text says why.
    """
    directory = os.getcwd()
    stdin = _read_stdin()
    given = bootstrap.parse_untrusted(stdin, task_id=args.id, namespace=args.namespace)
    group = bundle.read_group(directory, args.id)
    path = args.socket or address.socket_path(
        args.address, args.namespace, group.sandbox_id, given.socket_dir.removeprefix("unix://")
    )
    if group.kind == bundle.CONTAINER:
        if not address.answers(path):
            raise StartError(
                f"sandbox {group.sandbox_id!r} of container {args.id!r} has no running shim at {path}:"
                " the pod has ended, so it must be created again"
            )
        return address.write_address(directory, path)
    args.debug = args.debug or given.debug
    events = os.environ.get("TTRPC_ADDRESS", "") or given.ttrpc_address
    return described(directory, _start_server(args, directory, path, events, stdin))


def described(directory: str, text: str) -> str:
    """Return an address in the form that the bundle's owner takes.

    A plain one stands for version 2: there is no telling 1.7 from 2.x, and all take that. The bundle of a
    sandbox that a client makes lies where only 2.x puts it. There, version 3 lets containers join without a
    `start`, by the sandbox's id alone: with version 2 each would have to say in its annotations where it
    belongs, as those of the CRI plugin do.
    """
    if os.path.basename(os.path.dirname(os.path.dirname(directory))) != SANDBOX_CONTROLLER:
        return text
    return f'{{"version":3,"address":"{text}","protocol":"ttrpc"}}'


class StartError(Exception):
    """The serving process cannot be reached or could not come up; the text is for the user."""


def _read_stdin() -> bytes:
    """Read all of standard input, but never wait for a human."""
    try:
        if os.isatty(0) or stat.S_ISCHR(os.fstat(0).st_mode):
            return b""
        with open(0, "rb", closefd=False) as file:
            return file.read(bootstrap.MAX_INPUT)
    except OSError:
        return b""


def _start_server(args: Args, directory: str, path: str, ttrpc_address: str, stdin: bytes) -> str:
    sock = address.listen(path)
    if sock is None:
        return address.write_address(directory, path)
    containerd = os.getppid()
    pid = 0
    try:
        pid = os.fork()
        if pid == 0:
            _become_server(args, directory, path, sock.detach(), containerd, ttrpc_address, stdin)
        bundle.write_file(directory, bundle.SHIM_PID, str(pid))
        return address.write_address(directory, path)
    except BaseException:
        if pid > 0:
            os.kill(pid, SIGKILL)
            os.waitpid(pid, 0)
        for name in (bundle.SHIM_PID, "address"):
            address.remove(f"{directory}/{name}")
        address.remove(path)
        raise


def _become_server(
    args: Args,
    directory: str,
    path: str,
    listener: int,
    containerd: int,
    ttrpc_address: str,
    stdin: bytes,
) -> None:
    """Cut every tie to `start` and serve; ends the process, so that nothing of `start` is run by both."""
    status = 1
    try:
        os.setsid()
        _redirect(directory, listener)
        # From here on descriptor 2 is containerd's log, and `start` may end.
        notes = _settle(containerd)
        import gc

        gc.disable()  # what is imported lives for ever: looking through it would only take time
        from shim import serve

        gc.freeze()
        gc.enable()
        status = serve.main(
            args,
            path=path,
            bundle=directory,
            listener=listener,
            events=ttrpc_address,
            given=stdin,
            notes=notes,
            began=BEGAN,
        )
    except BaseException:
        address.remove(path)
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _redirect(directory: str, listener: int) -> None:
    """Let go of everything that was inherited: containerd waits until nobody has its pipe any more."""
    null = os.open("/dev/null", os.O_RDWR)
    log = _open_log(directory, null)
    for source, target in ((null, 0), (null, 1), (log, 2)):
        os.dup2(source, target)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if int(name) > 2 and int(name) != listener:
            try:
                os.close(int(name))
            except OSError:
                pass  # the one that listed the directory
    # The bundle is renamed and removed while the server still runs: nothing may be relative to it.
    os.chdir("/")


def _settle(containerd: int) -> list[str]:
    """Set what belongs to the process; return what did not work, all of which can be done without."""
    from shim import kernel

    notes = []
    steps = (kernel.own_mount_namespace, kernel.become_subreaper, kernel.raise_file_limit)
    for step in (*steps, lambda: _set_oom_score(containerd)):
        try:
            step()
        except OSError as exc:
            notes.append(f"serving process: {exc}")
    return notes


def _open_log(directory: str, null: int) -> int:
    """Open containerd's log. It reads that end before it runs us; where nobody does, there is no log."""
    try:
        log = os.open(f"{directory}/{bundle.LOG_FIFO}", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return null
    if log > 2:
        return log
    return null  # standard descriptors were closed: do not build on that


def _set_oom_score(containerd: int) -> None:
    """Be killed a little earlier than containerd, and far later than the pods."""
    with open(f"/proc/{containerd}/oom_score_adj", encoding="ascii") as file:
        score = int(file.read())
    score = max(OOM_SCORE_MIN, min(OOM_SCORE_MAX, score + 1))
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(str(score))


def main(args: Args) -> int:
    """Print the address and nothing else, without a newline: some daemons do not trim it."""
    text = start(args)
    os.write(1, text.encode())
    return 0
