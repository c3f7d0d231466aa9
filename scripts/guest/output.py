"""What the build writes: image files, the manifest guest.json and a configuration that points at them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from guest.data import BuildError, Recipe
from guest.initrd import ROOT_DEVICE, ROOT_TYPE
from guest.packages import Fetched, digest_of

SCHEMA_VERSION = 1
OUTPUTS = {"kernel": "vmlinux", "initrd": "initrd.img", "image": "rootfs.erofs"}
VIRTIOFSD_PATHS = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")  # Debian 12; newer suites


def write(path: Path, data: bytes) -> None:
    """Write a file in one go: a running VM keeps the old one open and intact."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


def make_erofs(directory: Path, image: Path, *, uuid: str) -> None:
    """Pack a directory; nothing of the machine (times, owners, extended attributes, UUID) gets in."""
    part = image.with_name(image.name + ".part")
    part.unlink(missing_ok=True)
    argv = ["mkfs.erofs", "--quiet", "-T0", "-U", uuid, "-x-1", "--all-root", str(part), str(directory)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"mkfs.erofs failed: {(done.stderr or done.stdout).strip()}")
    part.replace(image)


def write_manifest(
    directory: Path,
    recipe: Recipe,
    kernel_version: str,
    packages: Sequence[Fetched],
    wheels: Sequence[Fetched],
    agent_digest: str,
) -> None:
    """Write guest.json: what is in the guest and what it needs from whoever boots it."""
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "architecture": recipe.architecture,
        "kernel_version": kernel_version,
        "kernel_params": list(recipe.kernel_params),
        "rootfs_type": ROOT_TYPE,
        "root_device": ROOT_DEVICE,
        "agent_sha256": agent_digest,
        "files": {
            key: {
                "name": name,
                "size_bytes": (directory / name).stat().st_size,
                "sha256": digest_of(directory / name),
            }
            for key, name in OUTPUTS.items()
        },
        "packages": [_described(item) for item in packages],
        "wheels": [_described(item) for item in wheels],
    }
    write(directory / "guest.json", (json.dumps(manifest, indent=1) + "\n").encode())


def _described(item: Fetched) -> dict[str, str | bool]:
    return {
        "name": item.pin.name,
        "version": item.pin.version,
        "sha256": item.pin.sha256,
        "tested": item.locked,
    }


def write_configuration(out: Path, template: Path, recipe: Recipe) -> None:
    """Write configuration.toml for the guest in out/guest."""
    found = [path for path in VIRTIOFSD_PATHS if Path(path).exists()]
    text = template.read_text()
    values = {
        "GUEST_DIR": str((out / "guest").absolute()),
        "KERNEL_PARAMS": " ".join(recipe.kernel_params),
        "ROOTFS_TYPE": ROOT_TYPE,
        "VIRTIOFSD": (found or VIRTIOFSD_PATHS[:1])[0],
    }
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    write(out / "configuration.toml", text.encode())
