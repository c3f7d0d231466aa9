"""Saved VMs on disk: a private directory with one directory for each, complete or not there at all.

    <template_path>/lock                    held by whoever makes or removes one
    <template_path>/<key>/manifest.json     what it is, and what its guest told about itself
    <template_path>/<key>/memory, state     the guest's memory with holes; the machine without its memory
    <template_path>/tmp-<random>/           one that is being made; without the lock's holder, waste
    <template_path>/failed.json             why the last attempt to make or use one failed

A saved VM is run as it is, so whoever can write here owns every later pod, and whoever can read here reads
the guest's secrets: what does not belong to us alone is refused. The rule: a template is opened by
descriptors that were checked, and what is read of it later is what was checked, even if it is removed
meanwhile.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from vc.errors import VCError
from vc.persist.store import make_private

LOCK, MANIFEST, MEMORY, STATE, FAILED = "lock", "manifest.json", "memory", "state", "failed.json"
TEMPORARY = "tmp-"
MAX_MANIFEST_BYTES = 1 << 20
KEEP = 3  # templates; an older one belongs to a configuration or a guest that was replaced
OTHERS = stat.S_IRWXG | stat.S_IRWXO


class BrokenTemplate(VCError):
    """A template that must not be used, and may be removed."""


class ForeignTemplate(VCError):
    """A template that must not be used and is not ours to remove: others own it, or can write to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a template says about itself."""

    key: str
    memory_mib: int
    vcpus: int
    memory_bytes: int  # of the file `memory`, holes included
    data_bytes: int  # of it without the holes
    state_bytes: int  # of the file `state`
    memory_checksum: int
    state_checksum: int
    details: str  # base64 of the guest's GuestDetailsResponse
    made_at: float  # seconds since the epoch
    facts: dict[str, object]

    @property
    def guest_details(self) -> bytes:
        """The message of the guest's agent."""
        return base64.b64decode(self.details)


def format_manifest(manifest: Manifest) -> bytes:
    """Serialise a manifest as JSON."""
    return json.dumps(asdict(manifest), sort_keys=True, indent=1).encode() + b"\n"


def parse_manifest(data: bytes) -> Manifest:
    """Read a manifest. Raises: BrokenTemplate."""
    try:
        manifest = Manifest(**json.loads(data))
        for name in ("memory_mib", "vcpus", "memory_bytes", "data_bytes", "state_bytes"):
            if type(value := getattr(manifest, name)) is not int or value <= 0:
                raise BrokenTemplate(f"its manifest says {name} = {value!r}")
        if type(manifest.made_at) is not float or type(manifest.key) is not str:
            raise BrokenTemplate("its manifest has no key or no time")
        for checksum in (manifest.memory_checksum, manifest.state_checksum):
            if type(checksum) is not int:
                raise BrokenTemplate(f"its manifest has the checksum {checksum!r}")
        if type(manifest.facts) is not dict:
            raise BrokenTemplate("its manifest has no facts")
        base64.b64decode(manifest.details, validate=True)
    except (ValueError, TypeError, RecursionError) as exc:
        raise BrokenTemplate(f"its manifest cannot be read: {exc}") from exc
    return manifest


@dataclass(frozen=True, slots=True)
class Template:
    """One that was checked, and is open."""

    manifest: Manifest
    memory: int
    state: int


class Templates:
    """The templates in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    # Use

    @contextmanager
    def opened(self, key: str) -> Iterator[Template | None]:
        """Open a template for the length of the block; None if there is none.

        Raises: BrokenTemplate, ForeignTemplate.
        """
        with ExitStack() as stack:
            base = self._open_directory(stack, self.directory, None)
            place = None if base is None else self._open_directory(stack, Path(key), base)
            yield None if place is None else self._open_files(stack, key, place)

    def _open_directory(self, stack: ExitStack, path: Path, parent: int | None) -> int | None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, dir_fd=parent)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise ForeignTemplate(f"{str(self.directory / path)!r} is no directory of ours: {exc}") from exc
        stack.callback(os.close, descriptor)
        self._check_private(descriptor, self.directory / path)
        return descriptor

    def _open_files(self, stack: ExitStack, key: str, place: int) -> Template:
        files = {name: self._open_file(stack, key, place, name) for name in (MANIFEST, MEMORY, STATE)}
        manifest = parse_manifest(os.pread(files[MANIFEST], MAX_MANIFEST_BYTES, 0))
        if manifest.key != key:
            raise BrokenTemplate(f"its manifest is that of {manifest.key!r}")
        for name, size in ((MEMORY, manifest.memory_bytes), (STATE, manifest.state_bytes)):
            found = os.fstat(files[name]).st_size
            if found != size:
                raise BrokenTemplate(f"its file {name!r} has {found} bytes and should have {size}")
        return Template(manifest, files[MEMORY], files[STATE])

    def _open_file(self, stack: ExitStack, key: str, place: int, name: str) -> int:
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, dir_fd=place)
        except OSError as exc:
            raise BrokenTemplate(f"its file {name!r} cannot be opened: {exc.strerror}") from exc
        stack.callback(os.close, descriptor)
        self._check_private(descriptor, self.directory / key / name)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BrokenTemplate(f"its file {name!r} is no regular file")
        return descriptor

    def _check_private(self, descriptor: int, path: Path) -> None:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or found.st_mode & OTHERS:
            raise ForeignTemplate(
                f"{str(path)!r} belongs to user {found.st_uid} and has mode {stat.S_IMODE(found.st_mode):o}, "
                f"but must be accessible to user {os.geteuid()} alone; remove it or set its owner and mode"
            )

    def keys(self) -> list[str]:
        """List all templates, the newest first. They are not checked."""
        if not self.directory.is_dir():
            return []
        found = [entry for entry in self.directory.iterdir() if entry.is_dir() and not entry.is_symlink()]
        found = [entry for entry in found if not entry.name.startswith(TEMPORARY)]
        return [entry.name for entry in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)]

    # Change

    @contextmanager
    def locked(self, *, wait: bool) -> Iterator[bool]:
        """Hold the lock for the length of the block; False if it is taken and we do not wait.

        Waste of makers that died is removed first.

        Raises: ForeignTemplate, VCError.
        """
        with ExitStack() as stack:
            try:
                make_private(self.directory)
                self._open_directory(stack, self.directory, None)
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                lock = os.open(self.directory / LOCK, flags, 0o600)
            except OSError as exc:
                raise VCError(f"no template can be kept in {str(self.directory)!r}: {exc}") from exc
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            self._remove_waste()
            yield True

    @contextmanager
    def new(self, key: str) -> Iterator[Path]:
        """Give an empty directory that becomes the template when the block ends well. Needs the lock."""
        temporary = self.directory / (TEMPORARY + secrets.token_hex(8))
        temporary.mkdir(mode=0o700)
        try:
            yield temporary
            for path in temporary.iterdir():
                path.chmod(0o600)
            self.discard(key)
            temporary.rename(self.directory / key)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        (self.directory / FAILED).unlink(missing_ok=True)
        for old in self.keys()[KEEP:]:
            self.discard(old)

    def discard(self, key: str) -> None:
        """Remove a template, at once for whoever looks for it. Safe without the lock, and if it is gone."""
        waste = self.directory / (TEMPORARY + secrets.token_hex(8))
        with suppress(OSError):
            (self.directory / key).rename(waste)
            shutil.rmtree(waste, ignore_errors=True)

    def _remove_waste(self) -> None:
        for path in self.directory.glob(TEMPORARY + "*"):
            shutil.rmtree(path, ignore_errors=True)

    def remove_all(self) -> None:
        """Remove every template, and all that remembers one. Needs the lock, which stays."""
        for key in self.keys():
            self.discard(key)
        (self.directory / FAILED).unlink(missing_ok=True)

    # Failures

    def note_failure(self, key: str, text: str) -> None:
        """Remember that a template could not be made or used."""
        temporary = self.directory / f"{FAILED}.new"
        with suppress(OSError):  # a full disk may be what failed
            temporary.write_text(json.dumps({"key": key, "text": text, "at": time.time()}))
            temporary.replace(self.directory / FAILED)

    def failure(self, key: str) -> tuple[float, str] | None:
        """Return how many seconds ago this template could not be made or used the last time, and why."""
        try:
            noted = json.loads((self.directory / FAILED).read_text())
            if noted["key"] != key:
                return None
            return time.time() - float(noted["at"]), str(noted["text"])
        except (OSError, ValueError, TypeError, KeyError):
            return None
