"""A unix socket whose other end can go away and come back, as a daemon's does, between two ttrpc calls."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from protos.ttrpc.ttrpc_pb2 import Request
from ttrpc.frames import REQUEST, RESPONSE, Decoder, Frame

ANSWERED = 60.0  # seconds that only a daemon which hangs exceeds


class Relay:
    """Listens at `path` and passes everything on to `target`, while it is up.

    It goes down when each call that went through has its answer, and lets no further one through: a caller
    that misses an answer has to repeat the call, and what is to come once would come twice.
    """

    def __init__(self, path: Path, target: Path, *, delay: float = 0.0) -> None:
        """`delay` is the time in seconds that each answer takes longer."""
        self._path = path
        self._target = target
        self._delay = delay
        self._lock = threading.Condition()
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []
        self._unanswered: Counter[socket.socket] = Counter()  # calls, by connection to the target
        self.calls: Counter[str] = Counter()  # that went through, by service

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
        self._unanswered.clear()
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def down(self) -> None:
        """End all connections, and refuse new ones: there is no socket any more. Safe to call twice."""
        with self._lock:
            answered = self._lock.wait_for(lambda: not self._unanswered.total(), ANSWERED)
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
        assert answered, f"a call of {self._target} was not answered in {ANSWERED} s"

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
            threading.Thread(target=self._ask, args=(listener, near, far), daemon=True).start()
            threading.Thread(target=self._answer, args=(near, far), daemon=True).start()

    def _ask(self, listener: socket.socket, near: socket.socket, far: socket.socket) -> None:
        decoder = Decoder()

        def pass_on(data: bytes) -> None:
            with self._lock:
                if self._listener is not listener:
                    return
                for call in _payloads(decoder, data, REQUEST):
                    self._unanswered[far] += 1
                    self.calls[Request.FromString(call).service] += 1
            far.sendall(data)

        _copy(near, far, pass_on)

    def _answer(self, near: socket.socket, far: socket.socket) -> None:
        decoder = Decoder()

        def pass_on(data: bytes) -> None:
            time.sleep(self._delay)
            near.sendall(data)
            with self._lock:
                self._unanswered[far] -= len(_payloads(decoder, data, RESPONSE))
                self._lock.notify_all()

        _copy(far, near, pass_on)
        with self._lock:
            del self._unanswered[far]  # nobody waits on a connection that has ended
            self._lock.notify_all()


def _payloads(decoder: Decoder, data: bytes, kind: int) -> list[bytes]:
    frames = (frame for frame in decoder.receive_data(data) if isinstance(frame, Frame))
    return [frame.data for frame in frames if frame.kind == kind]


def _copy(source: socket.socket, sink: socket.socket, pass_on: Callable[[bytes], None]) -> None:
    try:
        while data := source.recv(65536):
            pass_on(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # one of the two ends was closed
