"""The record that a sandbox leaves on disk: versioned, written before what it names is acquired.

It holds only what another process needs to find and remove everything that the sandbox had; state that
lives in the VM or in memory is not in it. Reading tells old, new and broken records apart.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from types import UnionType

from vc.errors import VCError

VERSION = 1
MAX_RECORD_BYTES = 1 << 20  # a record is a few hundred bytes; anything larger is not one of ours


class BrokenRecord(VCError):
    """The record is not one that this version wrote; the caller cleans up by names alone."""


@dataclass(frozen=True, slots=True)
class SandboxRecord:
    """What a sandbox holds on the host."""

    id: str
    vmid: str
    owner_pid: int
    owner_start_ticks: int  # proc(5) stat field 22: tells a reused pid from the process that wrote this
    config_path: str
    created_at: float  # seconds since the epoch
    version: int = VERSION


def format_record(record: SandboxRecord) -> bytes:
    """Serialise a record as JSON."""
    return json.dumps(asdict(record), sort_keys=True, indent=1).encode() + b"\n"


def parse_record(data: bytes) -> SandboxRecord:
    """Read a record.

    Raises:
        BrokenRecord: it is not JSON, of another version, lacks a field, or names what cannot be.
    """
    try:
        fields = json.loads(data)
        if not isinstance(fields, dict):
            raise BrokenRecord(f"the sandbox record is a {type(fields).__name__}, not an object")
        if fields.get("version") != VERSION:
            raise BrokenRecord(f"the sandbox record has version {fields.get('version')!r}, this is {VERSION}")
        record = SandboxRecord(**fields)
    except (ValueError, TypeError, RecursionError) as exc:
        raise BrokenRecord(f"the sandbox record cannot be read: {exc}") from exc
    kinds: dict[str, type | UnionType] = {
        "id": str,
        "vmid": str,
        "owner_pid": int,
        "owner_start_ticks": int,
        "config_path": str,
        "created_at": int | float,
    }
    for name, kind in kinds.items():
        if not isinstance(getattr(record, name), kind):
            raise BrokenRecord(
                f"the sandbox record's {name} is {getattr(record, name)!r}, not of type {kind}"
            )
    # Whoever cleans up kills and removes by these.
    if record.owner_pid <= 0 or not record.vmid or "/" in record.vmid or record.vmid in (".", ".."):
        raise BrokenRecord(
            f"the sandbox record names VM {record.vmid!r} and process {record.owner_pid}, which cannot be"
        )
    return record
