"""The RPC server: ttrpc over a byte stream, a thread for each call.

`ttrpc.connection` knows the protocol; this file moves its bytes and runs the handlers. A connection that
ends leaves the calls that run alone: their effects stay, only their answers have nobody to go to. Whatever
a peer sends can at most end its own connection.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from agent import errors, log, threads
from ttrpc.connection import ServerConnection
from ttrpc.events import CallReceived
from ttrpc.status import Code, Status

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agent.streams import ByteStream
    from ttrpc.methods import AnyMethod, ServiceTable

READ_SIZE = 64 << 10


class Server:
    """Serves objects whose methods are called as `Method.attribute` says, with the request as only
    argument.
    """

    def __init__(self, services: Mapping[str, tuple[ServiceTable, object]]) -> None:
        self._tables = {name: table for name, (table, _) in services.items()}
        self._objects = {name: handler for name, (_, handler) in services.items()}

    def serve(self, stream: ByteStream) -> None:
        """Serve one connection until the peer closes it."""
        try:
            _Connection(self, stream, ServerConnection(self._tables)).run()
        except OSError as exc:
            log.debug("connection broken", error=exc)
        finally:
            stream.close()

    def call(self, method: AnyMethod, request: Any) -> Any:
        """Run the handler of one method; raises what it raises."""
        handler = getattr(self._objects[method.service], method.attribute, None)
        if handler is None:
            raise errors.Unsupported(f"method {method.name} is not implemented by this agent")
        return handler(request)

    def answered(self, method: AnyMethod) -> None:
        """Tell the handler's object that a successful answer has been written, if it wants to know."""
        hook = getattr(self._objects[method.service], "answered", None)
        if hook is not None:
            hook(method.name)


class _Connection:
    def __init__(self, server: Server, stream: ByteStream, protocol: ServerConnection) -> None:
        self._server = server
        self._stream = stream
        self._protocol = protocol
        self._lock = threading.Lock()  # of the protocol's state
        self._write_lock = threading.Lock()  # held while writing, so that frames keep their order

    def run(self) -> None:
        while data := self._stream.receive(READ_SIZE):
            with self._lock:
                events = self._protocol.receive_data(data)
                owing = self._protocol.queued_bytes
            for event in events:
                if isinstance(event, CallReceived):
                    threads.start(event.method.name, self._answer, event)
            if owing:
                self._flush()

    def _answer(self, event: CallReceived) -> None:
        method = event.method
        status = None
        try:
            response = self._server.call(method, event.request)
            with self._lock:
                self._protocol.reply(event.stream_id, response)
        except Exception as exc:  # the boundary of the RPC: everything becomes a status
            status = self._status_of(method, exc)
            with self._lock:
                self._protocol.fail(event.stream_id, status)
        self._flush()
        if status is None:
            self._server.answered(method)

    def _status_of(self, method: AnyMethod, exc: Exception) -> Status:
        status = errors.status_of(exc)
        if not errors.is_expected(exc):
            log.exception("call failed", exc, method=method.name)
        elif status.code != Code.NOT_FOUND:
            log.info("call refused", method=method.name, status=status)
        return status

    def _flush(self) -> None:
        with self._write_lock:
            with self._lock:
                data = self._protocol.data_to_send()
            if data:
                try:
                    self._stream.send(data)
                except OSError as exc:
                    log.debug("answer lost", error=exc)
