"""Read a bundle's config.json, and answer the questions that need no translation.

Rule: `parse_spec` accepts what the OCI runtime specification allows and raises nothing but `InvalidArgument`
with the JSON path, however odd or hostile the bytes are. What it returns is the JSON itself without nulls, so
the rest of the library reads plain dicts; every field that the agent API has is known to have its type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from protos.kata import oci_pb2
from vc.errors import InvalidArgument
from vc.oci.wire import describe, fill, items, members, string

MAX_SPEC_BYTES: Final = (
    8 << 20
)  # a spec with a full seccomp profile has 60 KiB; the agent takes 4 MiB messages
ID_PATTERN: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")  # Kata agent, container ids
MAX_ID_CHARS: Final = 128  # containerd's identifiers have 76 at most


class Role(Enum):
    """What a container is to its sandbox."""

    SINGLE = "single"  # no pod: sandbox and workload in one
    SANDBOX = "sandbox"  # the pod's first container, whose id is the sandbox's
    CONTAINER = "container"  # a later container of a pod
    MEMBER = "member"  # one of equals: the first to come makes the sandbox, the last to go ends it


@dataclass(frozen=True, slots=True)
class Identity:
    """A container's role, and the sandbox that it belongs to."""

    role: Role
    sandbox_id: str


@dataclass(frozen=True, slots=True)
class Dialect:
    """One container manager's annotations for pods."""

    type_key: str
    sandbox_id_key: str
    sandbox_value: str
    container_value: str = "container"


DIALECTS: Final = (
    # containerd internal/cri/annotations; CRI-O pkg/annotations; Kubernetes dockershim/docker_service.go
    Dialect("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id", "sandbox"),
    Dialect("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID", "sandbox"),
    Dialect("io.kubernetes.docker.type", "io.kubernetes.sandbox.id", "podsandbox"),
)
GROUP_KEY: Final = "io.containerd.runc.v2.group"  # containerd cmd/containerd-shim-runc-v2/manager


def read_spec(bundle: Path) -> dict[str, Any]:
    """Read and check the config.json of a bundle. Raises: InvalidArgument."""
    path = bundle / "config.json"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SPEC_BYTES + 1)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise InvalidArgument(f"cannot read the container's spec {path}: {reason}") from exc
    return parse_spec(data, str(path))


def parse_spec(data: bytes, name: str = "config.json") -> dict[str, Any]:
    """Take the bytes of a config.json; `name` stands at the head of errors. Raises: InvalidArgument."""
    if len(data) > MAX_SPEC_BYTES:
        raise InvalidArgument(f"{name} has more than {MAX_SPEC_BYTES} bytes")
    try:
        spec = json.loads(data.decode(), object_hook=_without_nulls, parse_constant=_no_constant)
    except RecursionError:
        raise InvalidArgument(f"{name} is nested too deeply") from None
    except ValueError as exc:  # JSONDecodeError, UnicodeDecodeError, numbers with too many digits
        raise InvalidArgument(f"{name} is not JSON: {exc}") from exc
    if not isinstance(spec, dict):
        raise InvalidArgument(f"{name}: got {describe(spec)}, must be an object")
    check_spec(spec, name)
    return spec


def check_spec(spec: Mapping[str, object], name: str = "config.json") -> None:
    """Check the types of all that the agent API can carry. Raises: InvalidArgument."""
    fill(oci_pb2.Spec(), spec, name, [])


def _without_nulls(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if value is not None}


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not a JSON value")


def check_id(value: str, what: str) -> str:
    """Return an id that is safe as a file name and in the guest. Raises: InvalidArgument."""
    if len(value) > MAX_ID_CHARS or not ID_PATTERN.fullmatch(value):
        raise InvalidArgument(
            f"{what} {describe(value)} must match {ID_PATTERN.pattern} with at most {MAX_ID_CHARS} characters"
        )
    return value


def read_annotations(spec: Mapping[str, Any]) -> dict[str, str]:
    """Return the spec's annotations. Raises: InvalidArgument."""
    found = members(spec.get("annotations") or {}, "annotations")
    return {key: string(value, f"annotations.{key}") for key, value in found.items()}


def identify(notes: Mapping[str, str], container_id: str) -> Identity:
    """Tell from a container's annotations which role it plays, and in which sandbox.

    Raises: InvalidArgument.
    """
    check_id(container_id, "container id")
    for dialect in DIALECTS:
        kind = notes.get(dialect.type_key)
        if kind is None:
            continue
        if kind == dialect.sandbox_value:
            return Identity(Role.SANDBOX, container_id)
        if kind == dialect.container_value:
            sandbox_id = notes.get(dialect.sandbox_id_key, "")
            return Identity(Role.CONTAINER, check_id(sandbox_id, f"annotation {dialect.sandbox_id_key}"))
        raise InvalidArgument(
            f"annotation {dialect.type_key}: got {describe(kind)}, "
            f'must be "{dialect.sandbox_value}" or "{dialect.container_value}"'
        )
    if GROUP_KEY in notes:
        return Identity(Role.MEMBER, check_id(notes[GROUP_KEY], f"annotation {GROUP_KEY}"))
    return Identity(Role.SINGLE, container_id)


def namespace(spec: Mapping[str, Any], kind: str) -> str | None:
    """Return the path of one of the spec's namespaces: "" asks for a new one, None for the host's."""
    linux = members(spec.get("linux") or {}, "linux")
    for index, entry in enumerate(items(linux.get("namespaces") or (), "linux.namespaces")):
        here = f"linux.namespaces[{index}]"
        fields = members(entry, here)
        if fields.get("type") == kind:
            return string(fields.get("path") or "", f"{here}.path")
    return None


def root(spec: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the root file system's path (relative to the bundle) and whether it is read-only."""
    found = members(spec.get("root") or {}, "root")
    return string(found.get("path") or "rootfs", "root.path"), found.get("readonly") is True
