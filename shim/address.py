"""Where a pod's shim listens, and who is listening there.

The path is `<socket dir>/<sha256 of "<containerd's address>/<namespace>/<sandbox id>">`, so that the `start`
of a pod's later containers finds the server of its first one without asking anybody. A socket that nobody
answers on is what a killed server left behind; one that answers is never touched.
"""

# pathlib costs 9 ms, and these functions are on the path of every start
# ruff: noqa: PTH101, PTH103, PTH105, PTH108, PTH120

import _socket
import errno
import os

try:
    from _sha256 import sha256  # type: ignore[import-not-found]  # Python 3.11; hashlib loads OpenSSL, 3 ms
except ImportError:
    from hashlib import sha256

SOCKET_DIR = "/run/containerd/s"
MAX_PATH = 106  # bytes: sun_path holds 108, a NUL included, and containerd's own shims stop one earlier
CONNECT_TIMEOUT = 0.1  # seconds, as the reference shim waits for a live server
BACKLOG = 128
SCHEME = "unix://"


class AddressError(Exception):
    """The shim cannot listen or be found there; the text is for the user."""


def socket_path(grpc_address: str, namespace: str, sandbox_id: str, socket_dir: str = "") -> str:
    """Return the path of the socket that serves a sandbox.

    Raises:
        AddressError: it does not fit into a socket address.
    """
    joined = os.path.normpath("/".join(part for part in (grpc_address, namespace, sandbox_id) if part))
    if joined.startswith("//"):  # POSIX gives two leading slashes a meaning; Go's path.Clean does not
        joined = joined[1:]
    path = f"{socket_dir or SOCKET_DIR}/{sha256(joined.encode()).hexdigest()}"
    if len(os.fsencode(path)) > MAX_PATH:
        raise AddressError(
            f"socket path {path!r} is longer than {MAX_PATH} bytes: choose a shorter socket_dir"
        )
    return path


def answers(path: str) -> bool:
    """Say whether a server accepts connections on `path`."""
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        probe.settimeout(CONNECT_TIMEOUT)
        probe.connect(path)
    except OSError as exc:
        # A full backlog (EAGAIN, or the timeout) is a server that lives and is busy.
        return exc.errno == errno.EAGAIN or isinstance(exc, TimeoutError)
    finally:
        probe.close()
    return True


def listen(path: str) -> _socket.socket | None:
    """Bind `path`, readable by nobody else, and listen there. None if a live server has it already.

    Raises:
        AddressError: it cannot be bound.
    """
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    mask = os.umask(0o077)  # the socket's mode is right from its first moment on: 0700 & ~0111 below
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        if not _bind(sock, path):
            if answers(path):
                sock.close()
                return None
            os.unlink(path)
            if not _bind(sock, path):
                raise AddressError(f"another shim took the socket {path!r} in this moment: try again")
        os.chmod(path, 0o600)
        sock.listen(BACKLOG)
    except (OSError, AddressError) as exc:
        sock.close()
        raise AddressError(f"cannot listen on {path!r}: {exc}") from exc
    finally:
        os.umask(mask)
    return sock


def _bind(sock: _socket.socket, path: str) -> bool:
    try:
        sock.bind(path)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            return False
        raise
    return True


def remove(path: str) -> None:
    """Unlink a socket; one that is gone already is fine."""
    try:
        os.unlink(path)
    except OSError:
        pass


def write_address(bundle: str, path: str) -> str:
    """Record the address in the bundle, where containerd looks after its restart, and return it."""
    address = SCHEME + path
    temporary = f"{bundle}/.address"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(address)
    os.replace(temporary, f"{bundle}/address")
    return address
