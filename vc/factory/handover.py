"""Handing over a VM from the process that keeps some ready to the one that runs a pod in it.

One connection to a unix socket of records (SOCK_SEQPACKET) is one hand-over. The taker sends one record, the
keeper of VMs answers with one: either the VM, with its descriptors beside it (SCM_RIGHTS), or why there is
none. JSON, because descriptors can only travel beside bytes, and neither gRPC nor ttrpc has a place for them.

    {"key": K}      a VM of exactly this configuration: see `cache_key`
    {"vmid": V}     the VM that was promised to whoever knows its name

The rule: a VM has one owner. It is the server's until the record was accepted by the kernel, and the taker's
from then on: should the taker die before it reads, the kernel drops the descriptors, and with the last one
the VM ends.

There is a second socket beside that of the gRPC service because to import grpc costs each pod's start 40 ms
and each shim 9.5 MB (measured). Whoever speaks gRPC asks there for a VM and fetches it here by its name.
"""

from __future__ import annotations

import array
import hashlib
import json
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

import trio

from vc.errors import HypervisorError
from vc.factory.identity import identify
from vc.hypervisor.base import VMConfig
from vc.hypervisor.lease import receive
from vc.hypervisor.parked import (
    DESCRIPTORS,
    MAX_MESSAGE,
    Parked,
    close_all,
    format_parked,
    parse_parked_untrusted,
)
from vc.unixsock import connect_nowait
from vc.words import reason

TIMEOUT = 3.0  # seconds for an answer; a server that works gives it in a few milliseconds
MAX_REQUEST = 512  # bytes
UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED
NONE_READY = "it has none ready"
OTHER_CONFIGURATION = "it keeps VMs of another configuration"
NO_SUCH = "it has no such VM"
NO_REQUEST = "it did not understand the request"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a taker asks for; one of the two is empty."""

    key: str = ""
    vmid: str = ""


def handover_path(endpoint: Path) -> Path:
    """Return where VMs of the cache at `endpoint` are handed over."""
    return endpoint.with_name(f"{endpoint.name}.handover")


def cache_key(config: VMConfig) -> str:
    """Return what two configurations have in common exactly if a VM of one can serve for the other.

    Blocks: see `identify`. Raises: HypervisorError, Unsupported.
    """
    key, _ = identify(config)
    # What a command line does not show: the directory is renamed within `run_dir`.
    facts = [key, str(config.run_dir), config.rootless]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def format_wanted(wanted: Wanted) -> bytes:
    """Serialise a request."""
    return json.dumps({"vmid": wanted.vmid} if wanted.vmid else {"key": wanted.key}).encode()


def parse_wanted_untrusted(data: bytes) -> Wanted | None:
    """Read a request; None if it is none."""
    try:
        fields = json.loads(data)
        if type(fields) is dict and len(fields) == 1:
            [(name, value)] = fields.items()
            if name in ("key", "vmid") and type(value) is str:
                return Wanted(**{name: value})
    except (ValueError, RecursionError):
        pass
    return None


def peer_uid(connection: socket.socket) -> int:
    """Return the user on the other side of a unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
    return int(UCRED.unpack(credentials)[1])


def send_vm(connection: socket.socket, parked: Parked) -> None:
    """Give a VM away; the caller closes it then. Raises: OSError, and the VM is still the caller's."""
    rights = array.array("i", parked.descriptors())
    connection.sendmsg([format_parked(parked)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


def send_refusal(connection: socket.socket, why: str) -> None:
    """Say why there is none. Raises: OSError."""
    connection.send(json.dumps({"refused": why}).encode())


async def take(endpoint: Path, wanted: Wanted) -> Parked:
    """Ask the cache at `endpoint` for a VM; the caller owns it and closes it.

    Raises: HypervisorError, which says why there is none.
    """
    path = handover_path(endpoint)
    try:
        connection = connect_nowait(path, socket.SOCK_SEQPACKET)
    except (FileNotFoundError, ConnectionRefusedError):
        raise HypervisorError(f"no cache runs at {str(endpoint)!r}") from None
    except OSError as exc:
        raise HypervisorError(f"the cache at {str(path)!r} cannot be reached: {exc.strerror}") from exc
    with connection:
        uid = peer_uid(connection)
        if uid not in (0, os.geteuid()):
            raise HypervisorError(f"the cache at {str(path)!r} is not ours: it belongs to user {uid}")
        try:
            connection.send(format_wanted(wanted))
            with trio.fail_after(TIMEOUT):
                data, descriptors = await receive(connection, MAX_MESSAGE, len(DESCRIPTORS))
        except trio.TooSlowError:
            raise HypervisorError(f"the cache does not answer within {TIMEOUT:g} s") from None
        except OSError as exc:
            raise HypervisorError(f"the cache died while it was asked: {exc.strerror}") from exc
    return _parse_answer_untrusted(data, descriptors)


def _parse_answer_untrusted(data: bytes, descriptors: list[int]) -> Parked:
    if descriptors:
        return parse_parked_untrusted(data, descriptors)
    if not data:
        raise HypervisorError("the cache died while it handed one over")
    try:
        why = reason(str(json.loads(data)["refused"]))
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        close_all(descriptors)
        raise HypervisorError(f"the cache's answer is none: {data[:100]!r}") from exc
    raise HypervisorError(f"the cache says that {why}")
