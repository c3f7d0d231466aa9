"""`-v` and `-info`: what this program is, from constants.

containerd asks -info when it starts and at the first task of a runtime, and a slow answer blocks it; so this
reads nothing but its standard input and probes nothing.
"""

import json
import os
import stat
from importlib.metadata import PackageNotFoundError, version

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError

from protos.containerd.types_pb2 import RuntimeInfo
from shim.args import Args
from shim.bootstrap import MAX_INPUT

NAME = "io.containerd.kata.v2"
DISTRIBUTION = "pykata"
FEATURES_URL = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"

# OCI runtime-spec, features.md. Only what is true is claimed: no user namespaces, no id-mapped or rro mounts.
FEATURES = {
    "ociVersionMin": "1.0.0",
    "ociVersionMax": "1.2.0",
    "linux": {
        "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
        "cgroup": {"v1": True, "v2": True},
        "mountExtensions": {"idmap": {"enabled": False}},
    },
}


def main(args: Args) -> int:
    """Print the version as text, or the runtime's description as a RuntimeInfo."""
    if args.action == "version":
        os.write(1, f"{NAME}: version {_version()}\n".encode())
    else:
        os.write(1, describe(_read_options()).SerializeToString())
    return 0


def describe(options: Any) -> RuntimeInfo:
    """Return the description; `options` is given back as it came."""
    info = RuntimeInfo(name=NAME)
    info.version.version = _version()
    if options.type_url:
        info.options.CopyFrom(options)
    info.features.type_url = FEATURES_URL
    info.features.value = json.dumps(FEATURES).encode()
    return info


def _version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown (not installed)"


def _read_options() -> Any:
    options = Any()
    if not stat.S_ISCHR(os.fstat(0).st_mode):
        with open(0, "rb", closefd=False) as file:
            try:
                options.ParseFromString(file.read(MAX_INPUT))
            except DecodeError:
                return Any()  # a newer containerd may ask in words that we do not know
    return options
