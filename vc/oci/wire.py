"""JSON of the OCI runtime specification -> messages of the agent API, by the messages' own descriptors.

The names differ only in case (`oomScoreAdj` and `OOMScoreAdj`), but for the ones in `RENAMED`, and the
descriptor says each field's type and range; so there is no table to keep and no field to forget. Rule:
whatever the JSON holds, nothing but `InvalidArgument` is raised, and it names the JSON path.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from vc.errors import InvalidArgument

RENAMED: Final = {"ociversion": "version"}  # runtime-spec config.md, "Specification version"; oci.proto Spec

# A device rule without a number means any number, and 0 is a number: on the wire "any" is -1, as it is inside
# runc and crun.
WILDCARD: Final = -1
_IF_ABSENT: Final[Mapping[str, Mapping[str, int]]] = {
    "LinuxDeviceCgroup": {"Major": WILDCARD, "Minor": WILDCARD},
}

_BOUNDS: Final = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_SHOWN_CHARS: Final = 80  # of a refused value or an odd name
_SHOWN_BITS: Final = 128  # Python refuses to print integers of thousands of digits


def fill(message: Message, value: object, path: str, notes: list[str]) -> None:
    """Set the message's fields from a JSON object found at `path`.

    What the message has no field for is left out, and `notes` gets a sentence about it. null is "not given".
    Raises: InvalidArgument.
    """
    table = _fields(message.DESCRIPTOR)
    for name, default in _IF_ABSENT.get(message.DESCRIPTOR.name, {}).items():
        setattr(message, name, default)
    for name, item in members(value, path).items():
        here = f"{path}.{shown_name(name)}"
        if item is None:
            continue
        field = table.get(name.lower())
        if field is None:
            notes.append(f"{here} has no place in the agent's API: left out")
        elif field.is_repeated:
            _fill_many(message, field, item, here, notes)
        elif field.message_type is not None:
            child = getattr(message, field.name)
            child.SetInParent()
            fill(child, item, here, notes)
        else:
            setattr(message, field.name, scalar(field, item, here))


def _fill_many(message: Message, field: FieldDescriptor, value: object, path: str, notes: list[str]) -> None:
    target: Any = getattr(message, field.name)
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        value_field = kind.fields_by_name["value"]
        for name, item in members(value, path).items():
            target[_string(name, path)] = scalar(value_field, item, f"{path}.{shown_name(name)}")
        return
    for index, item in enumerate(items(value, path)):
        here = f"{path}[{index}]"
        if kind is None:
            target.append(scalar(field, item, here))
        else:
            fill(target.add(), item, here, notes)


def members(value: object, path: str) -> Mapping[str, object]:
    """Return a JSON object. Raises: InvalidArgument if it is something else."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise refused(path, value, "an object")
    return value


def items(value: object, path: str) -> list[Any] | tuple[Any, ...]:
    """Return a JSON array. Raises: InvalidArgument if it is something else."""
    if not isinstance(value, list | tuple):
        raise refused(path, value, "an array")
    return value


def scalar(field: FieldDescriptor, value: object, path: str) -> bool | int | str:
    """Return the value if it fits the field. Raises: InvalidArgument."""
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return _string(value, path)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        if not isinstance(value, bool):
            raise refused(path, value, "true or false")
        return value
    low, high = _BOUNDS[field.cpp_type]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise refused(path, value, f"an integer from {low} to {high}")
    return value


def _string(value: object, path: str) -> str:
    if not isinstance(value, str):
        raise refused(path, value, "a string")
    if "\0" in value or not _encodable(value):
        raise refused(path, value, "a string without NUL and lone surrogates")
    return value


def string(value: object, path: str) -> str:
    """Return a string that the kernel and protobuf can hold. Raises: InvalidArgument."""
    return _string(value, path)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def refused(path: str, value: object, must_be: str) -> InvalidArgument:
    """Return the error for a value of the wrong kind."""
    return InvalidArgument(f"{path}: got {describe(value)}, must be {must_be}")


def describe(value: object) -> str:
    """Return a value and its JSON type, on one line and of bounded length."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "an array"
    if isinstance(value, int) and value.bit_length() > _SHOWN_BITS:
        return "a huge number"
    text = str(value)[: _SHOWN_CHARS + 1]
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    text = text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
    return f'"{text}" (a string)' if isinstance(value, str) else f"{text} (a number)"


def shown_name(name: str) -> str:
    """Return a member's name as a path shows it: bounded, on one line."""
    plain = name.isprintable() and len(name) <= _SHOWN_CHARS
    return name if plain else quoted(name)


def quoted(text: str) -> str:
    """Return a string in quotes, on one line and of bounded length."""
    return describe(text).removesuffix(" (a string)")


@cache
def _fields(descriptor: Descriptor) -> dict[str, FieldDescriptor]:
    """Return a message's fields by the lower-case form of their JSON names."""
    table = {field.name.lower(): field for field in descriptor.fields}
    return table | {json: table[name] for json, name in RENAMED.items() if name in table}
