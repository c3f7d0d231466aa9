"""The runtime options of a request or of `start`: which configuration file to use, and nothing else.

containerd's clients also send options that are meant for runc; they say nothing to us and are no error.
"""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError, Message

from protos.containerd.bootstrap_pb2 import BootstrapParams
from protos.containerd.runtimeoptions_pb2 import Options
from vc.errors import InvalidArgument

M = TypeVar("M", bound=Message)

# The second is the same message under the name that containerd up to 1.4 gave it.
OURS = ("runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options")


def from_start(given: bytes, *, task_id: str, namespace: str) -> str | None:
    """Return the path that the options name which containerd wrote to `start`, None if they name none.

    Up to 2.2 that is a google.protobuf.Any of the options, from 2.3 on a BootstrapParams with extensions
    (shim/bootstrap.py tells how the two are told apart). Whatever else it is says nothing.

    Raises:
        InvalidArgument: there are options that claim to be ours and cannot be read.
    """
    told = _parsed(BootstrapParams, given)
    if (told.instance_id, told.namespace) == (task_id, namespace):
        return next(filter(None, (config_path(extension.value) for extension in told.extensions)), None)
    return config_path(_parsed(Any, given))


def _parsed(kind: type[M], data: bytes) -> M:
    """Return a message, an empty one if the bytes are none of its kind."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return kind()


def config_path(options: Any) -> str | None:
    """Return the path that the options name, None if they name none.

    Raises:
        InvalidArgument: they claim to be ours and cannot be read.
    """
    if options.type_url.rpartition("/")[2] not in OURS:
        return None
    try:
        found = Options.FromString(options.value)
    except DecodeError as exc:
        raise InvalidArgument(f"the runtime options cannot be read as {options.type_url}: {exc}") from exc
    return found.config_path or None
