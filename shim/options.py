"""The runtime options of a Create request: which configuration file to use, and nothing else.

containerd's clients also send options that are meant for runc; they say nothing to us and are no error.
"""

from __future__ import annotations

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError

from protos.containerd.runtimeoptions_pb2 import Options
from vc.errors import InvalidArgument

# The second is the same message under the name that containerd up to 1.4 gave it.
OURS = ("runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options")


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
