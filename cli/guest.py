"""The guest's manifest `guest.json`, which the guest's build leaves beside the kernel and the image."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vc.config import Config

MANIFEST = "guest.json"


def read_manifest(config: Config) -> tuple[Path, dict[str, Any]] | None:
    """Return the manifest beside the kernel or the image, if there is one that can be read."""
    hypervisor = config.hypervisor
    for asset in (hypervisor.image, hypervisor.initrd, hypervisor.kernel):
        if asset is None:
            continue
        path = asset.parent / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(manifest, dict):
            return path, manifest
    return None


def changed_files(config: Config, path: Path, manifest: dict[str, Any]) -> list[Path]:
    """Return the configured files that lie beside the manifest and differ from what it says of them."""
    files = manifest.get("files")
    entries = list(files.values()) if isinstance(files, dict) else []
    digests = {entry.get("name"): entry.get("sha256") for entry in entries if isinstance(entry, dict)}
    hypervisor = config.hypervisor
    assets = [asset for asset in (hypervisor.kernel, hypervisor.image, hypervisor.initrd) if asset]
    return [
        asset
        for asset in assets
        if asset.parent == path.parent
        and asset.name in digests
        and _digest(asset) not in ("", digests[asset.name])
    ]


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
