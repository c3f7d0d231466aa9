"""What containerd writes to the standard input of `start`, read without protobuf.

Up to 2.2 it is a google.protobuf.Any of the runtime's options or nothing, from 2.3 on a BootstrapParams.
Each parses as the other, since both begin with two length-delimited fields. So it is taken for a
BootstrapParams only if it repeats the id and the namespace of the command line. Of the rest, `start` needs
three values; the options come again with the Create request. Whatever else stands there is ignored, for
`start` must never fail on its input.

A protobuf message is a row of fields: a varint key (field number << 3 | wire type), then a varint (type 0),
8 bytes (1), a varint length and that many bytes (2), or 4 bytes (5): protobuf.dev, "Encoding".
"""

MAX_INPUT = 4 << 20  # bytes; containerd's own limit for a message
INSTANCE_ID, NAMESPACE, LOG_LEVEL, TTRPC_ADDRESS, SOCKET_DIR = (
    1,
    2,
    3,
    5,
    9,
)  # bootstrap.proto, BootstrapParams
LOG_LEVEL_DEBUG = -4  # bootstrap.proto, LogLevel


class Bootstrap:
    """The parts of the parameters that concern `start`; all empty with an older containerd."""

    __slots__ = ("debug", "socket_dir", "ttrpc_address")

    def __init__(self) -> None:
        self.debug = False
        self.socket_dir = ""
        self.ttrpc_address = ""


def parse_untrusted(data: bytes, *, task_id: str, namespace: str) -> Bootstrap:
    """Return what `data` says if it is a BootstrapParams for this task, else an empty one. Never raises."""
    bootstrap = Bootstrap()
    try:
        fields = _fields(data)
        if _text(fields, INSTANCE_ID) != task_id or _text(fields, NAMESPACE) != namespace:
            return bootstrap
        level = fields.get(LOG_LEVEL, 0)
        bootstrap.debug = isinstance(level, int) and _signed(level) <= LOG_LEVEL_DEBUG
        bootstrap.socket_dir = _text(fields, SOCKET_DIR)
        bootstrap.ttrpc_address = _text(fields, TTRPC_ADDRESS).removeprefix("unix://")
    except (ValueError, IndexError):
        return Bootstrap()
    return bootstrap


def _text(fields: dict[int, int | bytes], number: int) -> str:
    value = fields.get(number, b"")
    return value.decode() if isinstance(value, bytes) else ""


def _signed(value: int) -> int:
    """Turn a varint's value into the int32 it stands for: negative ones are sent as 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _fields(data: bytes) -> dict[int, int | bytes]:
    """Return the last value of each field.

    Raises:
        ValueError, IndexError: this is no protobuf message.
    """
    fields: dict[int, int | bytes] = {}
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            fields[number], position = _varint(data, position)
            continue
        if wire_type == 2:
            length, position = _varint(data, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if length > len(data) - position:
            raise ValueError("a field reaches past the end")
        fields[number] = data[position : position + length]
        position += length
    return fields


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a varint of more than 10 bytes")
