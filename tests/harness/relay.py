"""A unix socket whose other end can go away and come back, as a daemon's does."""

import socket
import threading
from pathlib import Path
from types import TracebackType


class Relay:
    """Listens at `path` and passes everything on to `target`, while it is up."""

    def __init__(self, path: Path, target: Path) -> None:
        self._path = path
        self._target = target
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []

    def __enter__(self) -> "Relay":
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.down()

    def up(self) -> None:
        """Listen."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._path))
        listener.listen()
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def down(self) -> None:
        """End all connections, and refuse new ones: there is no socket any more. Safe to call twice."""
        with self._lock:
            listener, self._listener = self._listener, None
            ended, self._open = self._open, []
        if listener is None:
            return
        self._path.unlink()
        for sock in (listener, *ended):
            try:
                sock.shutdown(socket.SHUT_RDWR)  # wakes whoever waits in another thread
            except OSError:
                pass  # the other side was quicker
            sock.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            try:
                far.connect(str(self._target))
            except OSError:
                near.close()
                continue
            with self._lock:
                if self._listener is not listener:
                    near.close()
                    far.close()
                    return
                self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # one of the two ends was closed
