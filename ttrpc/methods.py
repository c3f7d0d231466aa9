"""Method tables out of protobuf service descriptors, so that no stubs have to be generated.

    HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
    methods.service(HEALTH)["Check"]
    methods.method(HEALTH, "Check", CheckRequest, HealthCheckResponse)  # the same, with its types

A table is all that the protocol needs to know of a service: names, message classes, which side streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

if TYPE_CHECKING:
    from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)


class Method(Generic[Q, R]):
    """One method of a service. `attribute` is its name as Python spells it: `get_oom_event`."""

    __slots__ = (
        "attribute",
        "client_streaming",
        "name",
        "request_class",
        "response_class",
        "server_streaming",
        "service",
    )

    def __init__(
        self,
        service: str,
        name: str,
        request_class: type[Q],
        response_class: type[R],
        *,
        client_streaming: bool = False,
        server_streaming: bool = False,
    ) -> None:
        self.service = service
        self.name = name
        self.request_class = request_class
        self.response_class = response_class
        self.client_streaming = client_streaming
        self.server_streaming = server_streaming
        self.attribute = snake_case(name)

    def __repr__(self) -> str:
        kind = ("stream " if self.client_streaming else "", "stream " if self.server_streaming else "")
        request, response = self.request_class.DESCRIPTOR, self.response_class.DESCRIPTOR
        return f"<{self.service}.{self.name}({kind[0]}{request.name}) returns ({kind[1]}{response.name})>"


AnyMethod = Method[Any, Any]  # for code that works with every method
ServiceTable = dict[str, Method[Message, Message]]  # by method name


def service(descriptor: ServiceDescriptor) -> ServiceTable:
    """Return the methods of a service by their name on the wire."""
    return {entry.name: _from_descriptor(entry) for entry in descriptor.methods}


def method(descriptor: ServiceDescriptor, name: str, request: type[Q], response: type[R]) -> Method[Q, R]:
    """Return one method with the types that a type checker knows its messages by.

    Raises KeyError if the service has no such method, TypeError if its messages are others.
    """
    entry = descriptor.methods_by_name[name]
    if entry.input_type is not request.DESCRIPTOR or entry.output_type is not response.DESCRIPTOR:
        raise TypeError(
            f"{entry.full_name} takes {entry.input_type.full_name} and returns {entry.output_type.full_name},"
            f" not {request.DESCRIPTOR.full_name} and {response.DESCRIPTOR.full_name}"
        )
    return cast("Method[Q, R]", _from_descriptor(entry))


def _from_descriptor(entry: MethodDescriptor) -> Method[Message, Message]:
    return Method(
        entry.containing_service.full_name,
        entry.name,
        GetMessageClass(entry.input_type),
        GetMessageClass(entry.output_type),
        client_streaming=entry.client_streaming,
        server_streaming=entry.server_streaming,
    )


def snake_case(name: str) -> str:
    """Return a name as Python spells it. Capitals in a row are one word: `OnlineCPUMem`, `online_cpu_mem`."""
    words = ""
    for index, letter in enumerate(name):
        after_lower = index > 0 and not name[index - 1].isupper()
        before_lower = index + 1 < len(name) and name[index + 1].islower()
        if letter.isupper() and index > 0 and (after_lower or before_lower):
            words += "_"
        words += letter.lower()
    return words
