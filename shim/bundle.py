"""The bundle: config.json, what its annotations say of the pod, and the small files we keep beside it.

`start` and `delete` use this module too, so it imports json only when a pod's annotation is really there.
"""

# pathlib costs 9 ms, and these functions are on the path of every start
# ruff: noqa: PTH105, PTH112

import os

MAX_CONFIG = 16 << 20  # bytes; the largest config.json seen in the field has some hundred kilobytes
SANDBOX, CONTAINER, MEMBER = "sandbox", "container", "member"

# Which annotations say what a container is in its pod: (type, sandbox id), by who writes them.
POD_ANNOTATIONS = (
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),  # containerd's CRI plugin
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),  # CRI-O
    ("io.kubernetes.docker.type", "io.kubernetes.sandbox.id"),  # dockershim
)
# Containers with the same value share a shim, whichever comes first: containerd's shim for runc.
GROUP_KEY = "io.containerd.runc.v2.group"
TYPES = {"sandbox": SANDBOX, "podsandbox": SANDBOX, "container": CONTAINER}

LOG_FIFO = "log"  # containerd's, which it reads as long as the task is there

# Files of ours in the bundle; containerd removes them with it.
SHIM_PID = "shim.pid"  # the serving process
INIT_PID = "init.pid"  # the task's pid as containerd knows it
RUN_DIR = "run-dir"  # where the sandbox's record is; written before there is one
EXIT = "exit"  # how the init process ended, for a `delete` after our own death: status and time
# containerd's (1.7 on): which sandbox the task joined, if it did so by no `start` of ours (Sandbox API).
JOINED = "sandbox"


class BundleError(Exception):
    """The bundle cannot be used as it is; the text names the file and what is wrong."""


class Group:
    """What a container is in its pod. A stand-alone container is the sandbox of itself.

    Members of a group are equals: the first to come makes the sandbox, the last to go ends it.
    """

    __slots__ = ("kind", "sandbox_id")

    def __init__(self, kind: str, sandbox_id: str) -> None:
        self.kind = kind
        self.sandbox_id = sandbox_id


def group_of(annotations: "dict[str, str]", container_id: str) -> Group:
    """Say to which sandbox a container with these annotations belongs.

    Raises:
        BundleError: the type is unknown, or a container does not say properly to which others it belongs.
    """
    for type_key, id_key in POD_ANNOTATIONS:
        if type_key not in annotations:
            continue
        value = annotations[type_key]
        kind = TYPES.get(value)
        if kind is None:
            raise BundleError(f"annotation {type_key} is {value!r}: expected one of {', '.join(TYPES)}")
        if kind == SANDBOX:
            return Group(SANDBOX, container_id)
        sandbox_id = annotations.get(id_key, "")
        if not sandbox_id or "/" in sandbox_id:
            raise BundleError(
                f"container {container_id!r} is of type {value!r}, but {id_key} is {sandbox_id!r}"
            )
        return Group(CONTAINER, sandbox_id)
    if GROUP_KEY in annotations:
        name = annotations[GROUP_KEY]
        if not name or "/" in name:
            raise BundleError(f"container {container_id!r}: {GROUP_KEY} is {name!r}, which names no group")
        return Group(MEMBER, name)
    return Group(SANDBOX, container_id)


def read_group(bundle: str, container_id: str) -> Group:
    """Read just as much of config.json as the grouping needs. A sandbox that a client made has none.

    Raises:
        BundleError: config.json is there and useless.
    """
    joined = read_file(bundle, JOINED)
    if joined:
        return Group(CONTAINER, joined)
    path = f"{bundle}/config.json"
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG + 1)
    except FileNotFoundError:
        return Group(SANDBOX, container_id)
    except OSError as exc:
        raise BundleError(f"cannot read {path}: {exc.strerror}") from exc
    keys = (GROUP_KEY, *(type_key for type_key, _ in POD_ANNOTATIONS))
    if not any(key.encode() in data for key in keys):
        return Group(SANDBOX, container_id)
    return group_of(annotations_of(parse_config(data, path), path), container_id)


def parse_config(data: bytes, path: str) -> "dict[str, object]":
    """Return the object in `data`, which came from `path`."""
    import json

    if len(data) > MAX_CONFIG:
        raise BundleError(f"{path} has more than {MAX_CONFIG} bytes")
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise BundleError(f"{path} is not JSON: {exc}") from exc
    if not isinstance(config, dict):
        raise BundleError(f"{path} holds no object")
    return config


def annotations_of(config: "dict[str, object]", path: str) -> "dict[str, str]":
    """Return the annotations of a spec."""
    found = config.get("annotations") or {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise BundleError(f"{path}: annotations is no object of strings")
    return found


def bundle_dir(path: str) -> str:
    """Return a client's path of a bundle. It stays as it was: clients get it back. Raises: BundleError."""
    if not path.startswith("/"):
        raise BundleError(f"bundle {path!r} is no absolute path")
    if not os.path.isdir(path):
        raise BundleError(f"bundle {path!r} is no directory")
    return path


def read_file(bundle: str, name: str) -> str:
    """Return the text of one of our files in the bundle, empty if it is not there."""
    try:
        with open(f"{bundle}/{name}", encoding="utf-8") as file:
            return file.read(4096).strip()
    except (OSError, ValueError):
        return ""


def read_pid(bundle: str, name: str) -> int:
    """Return the process id in one of our files, 0 if there is none."""
    text = read_file(bundle, name)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def write_file(bundle: str, name: str, text: str) -> None:
    """Put one of our files in place at once."""
    temporary = f"{bundle}/.{name}"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, f"{bundle}/{name}")


def write_exit(bundle: str, status: int, at: float) -> None:
    """Note how a task's init process ended; `at` is in seconds since the epoch. Raises: OSError."""
    write_file(bundle, EXIT, f"{status} {at:.9f}")


def read_exit(bundle: str) -> "tuple[int, float] | None":
    """Return what `write_exit` noted, None if nothing."""
    status, _, at = read_file(bundle, EXIT).partition(" ")
    if not (status.isdecimal() and at.replace(".", "", 1).isdecimal()):
        return None
    return int(status), float(at)
