"""protobuf without its Python half: the generated modules import in a fifth of the time.

Messages are made by an extension module (upb); what generated code imports from `google.protobuf` beside it
is reflection, text formats and code for other implementations, and importing that takes longer than
everything else the agent does until it serves. `install` puts small stand-ins with the few functions that
generated code and ttrpc call in the place of those modules. It must come before any other import of
protobuf, and only a program that owns its whole process may do it, which is why nothing but the agent's
start-up does. If the extension is not there, or protobuf is loaded already, nothing happens, and everything
works as usual.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

PACKAGE = "google.protobuf"


def install() -> bool:
    """Put the stand-ins in place; returns whether it was done."""
    if f"{PACKAGE}.descriptor" in sys.modules:
        return False
    try:
        from google._upb import _message
    except ImportError:
        return False
    pool = _message.default_pool
    _module("descriptor", _USE_C_DESCRIPTORS=True)
    _module("descriptor_pool", Default=lambda: pool)
    _module("symbol_database", Default=lambda: None)
    _module("runtime_version", Domain=_Domain, ValidateProtobufRuntimeVersion=lambda *_: None)
    _module("message_factory", GetMessageClass=_class_of)
    # The extension asks for it when it makes the first class; it gives Timestamp and its like their methods.
    _module("internal.well_known_types", WKTBASES={})
    _module(
        "internal.builder",
        BuildMessageAndEnumDescriptors=_nothing,
        BuildTopDescriptorsAndMessages=_build,
        BuildServices=_nothing,
    )
    return True


class _Domain:
    PUBLIC = None


def _module(name: str, **contents: object) -> None:
    full = f"{PACKAGE}.{name}"
    module = ModuleType(full)
    module.__dict__.update(contents)
    sys.modules[full] = module
    parent, _, last = full.rpartition(".")
    # `from google.protobuf import descriptor` looks for an attribute first.
    setattr(sys.modules[parent], last, module)


def _nothing(*_: object) -> None:
    pass


def _class_of(descriptor: Any) -> Any:
    return descriptor._concrete_class  # what message_factory.GetMessageClass returns with this implementation


def _make_class(descriptor: Any, module_name: str) -> type:
    """Make the class of a message, and those of the messages inside it."""
    from google._upb import _message
    from google.protobuf.message import Message

    contents = {
        name: _make_class(nested, module_name) for name, nested in descriptor.nested_types_by_name.items()
    }
    made: type = _message.MessageMeta(
        descriptor.name, (Message,), {**contents, "DESCRIPTOR": descriptor, "__module__": module_name}
    )
    return made


def _build(file: Any, module_name: str, contents: dict[str, object]) -> None:
    """Give a generated module its message classes and the wrappers of its enumerations."""
    from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

    for name, descriptor in file.message_types_by_name.items():
        contents[name] = _make_class(descriptor, module_name)
    for name, enumeration in file.enum_types_by_name.items():
        contents[name] = EnumTypeWrapper(enumeration)
        for value in enumeration.values:
            contents[value.name] = value.number
