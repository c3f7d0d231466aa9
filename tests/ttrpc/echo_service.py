"""A service with one method of each kind, for the tests of this directory."""

from __future__ import annotations

from google.protobuf import descriptor_pb2, descriptor_pool, empty_pb2, wrappers_pb2
from google.protobuf.wrappers_pb2 import BytesValue

from ttrpc import methods

NAME = "pykata.test.Echo"

_BYTES = "." + BytesValue.DESCRIPTOR.full_name
_EMPTY = "." + empty_pb2.Empty.DESCRIPTOR.full_name
_METHODS = [  # name, request, response, client streams, server streams
    ("Echo", _BYTES, _BYTES, False, False),
    ("DoNothing", _EMPTY, _EMPTY, False, False),
    ("Expand", _BYTES, _BYTES, False, True),
    ("Collect", _BYTES, _BYTES, True, False),
    ("Chat", _BYTES, _BYTES, True, True),
]


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="pykata_test_echo.proto", package="pykata.test", syntax="proto3"
    )
    file.dependency[:] = [wrappers_pb2.DESCRIPTOR.name, empty_pb2.DESCRIPTOR.name]
    service = file.service.add(name="Echo")
    for name, request, response, client, server in _METHODS:
        service.method.add(
            name=name,
            input_type=request,
            output_type=response,
            client_streaming=client,
            server_streaming=server,
        )
    return file


descriptor_pool.Default().Add(_file())
DESCRIPTOR = descriptor_pool.Default().FindServiceByName(NAME)

TABLE = methods.service(DESCRIPTOR)
ECHO = methods.method(DESCRIPTOR, "Echo", BytesValue, BytesValue)
EXPAND = methods.method(DESCRIPTOR, "Expand", BytesValue, BytesValue)
COLLECT = methods.method(DESCRIPTOR, "Collect", BytesValue, BytesValue)
CHAT = methods.method(DESCRIPTOR, "Chat", BytesValue, BytesValue)
DO_NOTHING = methods.method(DESCRIPTOR, "DoNothing", empty_pb2.Empty, empty_pb2.Empty)


def value(data: bytes = b"") -> BytesValue:
    return BytesValue(value=data)
