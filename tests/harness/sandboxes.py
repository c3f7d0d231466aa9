"""containerd's own sandboxes: made through the services that its clients have for them, before any container.

`ctr` cannot do it: its `sandboxes run` starts a sandbox that it has not created. Containers join with
`ctr run --sandbox ID`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc  # type: ignore[import-untyped]
from google.protobuf.any_pb2 import Any as AnyMessage

from protos.containerd import sandbox_services_pb2 as api
from tests.harness.containerd import TIMEOUT, Containerd
from ttrpc import methods

SERVICES = {name: methods.service(entry) for name, entry in api.DESCRIPTOR.services_by_name.items()}
SANDBOXER = "shim"  # the controller of 2.x that hands everything on to the runtime


@dataclass(frozen=True, slots=True)
class Sandbox:
    """One sandbox of a containerd, by its id, with a connection."""

    id: str
    containerd: Containerd
    channel: grpc.Channel
    has_sandboxers: bool = field(default=True)

    def ask(self, method: str, *, service: str = "Controller", **fields: Any) -> Any:
        """Call one of containerd's methods. Raises: grpc.RpcError."""
        return self.answer(self.begin(method, service=service, **fields))

    def answer(self, call: Any) -> Any:
        """Wait for a call that is under way. Raises: grpc.RpcError."""
        try:
            return call.result()
        except grpc.RpcError as exc:
            # 1.7 has done it then: it fails to tell of it, under a topic that it does not allow itself.
            if not self.has_sandboxers and 'envelope topic "sandboxes/' in call.details():
                return None
            raise exc

    def begin(self, method: str, *, service: str = "Controller", **fields: Any) -> Any:
        """The same, but return the call, which is under way."""
        entry = SERVICES[service][method]
        request: Any = entry.request_class(**fields)
        if "sandbox_id" in request.DESCRIPTOR.fields_by_name:
            request.sandbox_id = self.id
        if self.has_sandboxers and "sandboxer" in request.DESCRIPTOR.fields_by_name:
            request.sandboxer = SANDBOXER
        call = self.channel.unary_unary(
            f"/{entry.service}/{entry.name}",
            request_serializer=entry.request_class.SerializeToString,
            response_deserializer=entry.response_class.FromString,
        )
        namespace = (("containerd-namespace", self.containerd.namespace),)
        return call.future(request, timeout=TIMEOUT, metadata=namespace)

    def create(self, *, options: AnyMessage | None = None, pod: AnyMessage | None = None) -> None:
        """Let containerd know it, and have the runtime prepare it.

        `options` are the runtime's, `pod` is the configuration that the CRI plugin would send.
        """
        known: dict[str, Any] = {
            "sandbox_id": self.id,
            "runtime": {"name": self.containerd.runtime.name, "options": options},
        }
        if self.has_sandboxers:
            known["sandboxer"] = SANDBOXER
        self.ask("Create", service="Store", sandbox=known)
        more: dict[str, Any] = {"sandbox": known} if self.has_sandboxers else {}
        self.ask("Create", options=pod, **more)

    def run(self, *command: str, flags: tuple[str, ...] = (), **more: Any) -> Any:
        """Run a container in it to its end, as `Containerd.run` does."""
        return self.containerd.run(*command, flags=["--sandbox", self.id, *flags], **more)

    def remove(self) -> None:
        """End it in whatever state it is, and let containerd forget it."""
        for method, service in (("Stop", "Controller"), ("Shutdown", "Controller"), ("Delete", "Store")):
            try:
                self.ask(method, service=service)
            except grpc.RpcError:
                continue  # as with the client's own forced removal: what is not there is gone


@contextmanager
def sandbox(containerd: Containerd) -> Iterator[Sandbox]:
    """Yield a sandbox that is nowhere yet; remove it."""
    with grpc.insecure_channel(f"unix:{containerd.address}") as channel:
        made = Sandbox(containerd.new_id("sb"), containerd, channel, containerd.version() >= (2, 0))
        try:
            yield made
        finally:
            made.remove()
