"""Fetch Debian packages and wheels: which version, from where, and is it the right file.

lock.json holds version and SHA-256 of what was last tested. A mirror drops a version soon after a security
update has replaced it, so a lock alone would break every user a month later. The rule: a locked file that is
in the cache or that apt still offers is taken; otherwise the version that apt would install is taken, the
user is told, and the manifest records what went in. apt checks its own signatures and digests, so the
fallback is as trustworthy as the machine. Wheels do not vanish: for them the lock is binding.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from guest.data import BuildError

LOCK_VERSION = 1


@dataclass(frozen=True, slots=True)
class Pin:
    """One version of one package and the digest of its file."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Lock:
    """The versions that were last tested; empty tuples when there is no lock yet."""

    kernel: Pin | None = None
    packages: tuple[Pin, ...] = ()
    wheels: tuple[Pin, ...] = ()

    def package(self, name: str) -> Pin | None:
        """Find the pin of a Debian package."""
        return next((pin for pin in self.packages if pin.name == name), None)

    def wheel(self, name: str) -> Pin | None:
        """Find the pin of a wheel."""
        return next((pin for pin in self.wheels if pin.name == name), None)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A package on disk."""

    pin: Pin
    path: Path
    locked: bool  # is it what the lock names


def load_lock(path: Path) -> Lock:
    """Read lock.json."""
    table = json.loads(path.read_text())
    if table.get("version") != LOCK_VERSION:
        raise BuildError(f"{path}: version {table.get('version')!r}, this program reads {LOCK_VERSION}")
    return Lock(
        kernel=Pin(**table["kernel"]),
        packages=tuple(Pin(**entry) for entry in table["packages"]),
        wheels=tuple(Pin(**entry) for entry in table["wheels"]),
    )


def save_lock(path: Path, lock: Lock) -> None:
    """Write lock.json, sorted, so that a diff shows what moved."""
    table = {
        "version": LOCK_VERSION,
        "kernel": asdict(lock.kernel) if lock.kernel else None,
        "packages": [asdict(pin) for pin in sorted(lock.packages, key=lambda pin: pin.name)],
        "wheels": [asdict(pin) for pin in sorted(lock.wheels, key=lambda pin: pin.name)],
    }
    path.write_text(json.dumps(table, indent=1) + "\n")


class Apt:
    """What this machine's apt offers, asked once for all packages."""

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture
        self._records: dict[str, list[dict[str, str]]] = {}
        self._candidates: dict[str, str] = {}

    def learn(self, names: Sequence[str]) -> None:
        """Ask apt about packages; unknown ones are simply not known afterwards."""
        if not names:
            return
        self.add(_run_apt(["apt-cache", "show", *names]), _run_apt(["apt-cache", "policy", *names]))

    def add(self, shown: str, policy: str) -> None:
        """Take in the output of `apt-cache show` and `apt-cache policy`."""
        for record in parse_records(shown):
            if record.get("Architecture") in (self._architecture, "all"):
                self._records.setdefault(record["Package"], []).append(record)
        self._candidates.update(parse_policy(policy))

    def offers(self, pin: Pin) -> bool:
        """Tell whether exactly this file can be downloaded."""
        return any(
            record["Version"] == pin.version and record.get("SHA256") == pin.sha256
            for record in self._records.get(pin.name, [])
        )

    def candidate(self, name: str) -> Pin:
        """Return the version that apt would install."""
        return _pin_of(self._candidate_record(name))

    def choose(self, name: str, locked: Pin | None) -> Pin:
        """Return the locked version if it can still be had, else the one that apt would install."""
        if locked is not None and self.offers(locked):
            return locked
        return self.candidate(name)

    def kernel_of(self, metapackage: str) -> str:
        """Return the kernel package that a metapackage depends on."""
        depends = self._candidate_record(metapackage).get("Depends", "")
        match = re.search(r"\blinux-image-[0-9][^\s,(]*", depends)
        if match is None:
            raise BuildError(f"{metapackage} depends on no kernel image (Depends: {depends or 'nothing'})")
        return match[0]

    def _candidate_record(self, name: str) -> dict[str, str]:
        version = self._candidates.get(name)
        for record in self._records.get(name, []):
            if record["Version"] == version:
                return record
        raise BuildError(f"apt offers no package {name} for {self._architecture}: run `apt-get update` first")


def _pin_of(record: dict[str, str]) -> Pin:
    return Pin(record["Package"], record["Version"], record["SHA256"])


def parse_records(text: str) -> list[dict[str, str]]:
    """Split `apt-cache show` into stanzas; continuation lines (descriptions) are left out."""
    records = []
    for stanza in text.split("\n\n"):
        record = {}
        for line in stanza.splitlines():
            key, separator, value = line.partition(": ")
            if separator and not line.startswith(" "):
                record[key] = value.strip()
        if "Package" in record and "Version" in record:
            records.append(record)
    return records


def parse_policy(text: str) -> dict[str, str]:
    """Take package -> candidate out of `apt-cache policy`."""
    candidates = {}
    name = ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            name = line.rstrip(":")
        elif line.strip().startswith("Candidate:"):
            version = line.split(":", 1)[1].strip()
            if version != "(none)":
                candidates[name] = version
    return candidates


def _run_apt(argv: list[str]) -> str:
    # An unknown package makes apt-cache fail after it has answered for the others.
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, env=os.environ | {"LC_ALL": "C.UTF-8"}
    )
    return done.stdout


class Store:
    """The cache directory: files named by their SHA-256, so that a hit needs no check but the digest."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def find(self, sha256: str, suffix: str) -> Path | None:
        """Return the cached file, or None; a damaged one is removed."""
        path = self._directory / f"{sha256}{suffix}"
        if not path.exists():
            return None
        if digest_of(path) == sha256:
            return path
        path.unlink()
        return None

    def add(self, path: Path, sha256: str, suffix: str, what: str) -> Path:
        """Move a downloaded file in; raises BuildError if it is not the promised one."""
        actual = digest_of(path)
        if actual != sha256:
            raise BuildError(f"{what}: downloaded file has SHA-256 {actual}, expected {sha256}")
        target = self._directory / f"{sha256}{suffix}"
        shutil.copyfile(path, target.with_suffix(".part"))
        target.with_suffix(".part").replace(target)
        return target


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_debs(
    names: Sequence[str], kernel: str, lock: Lock, store: Store, architecture: str
) -> list[Fetched]:
    """Get all packages; the first result is the kernel image that the metapackage `kernel` stands for."""
    wanted: dict[str, Pin | None] = {name: lock.package(name) for name in names}
    cached = {pin.name for pin in (lock.kernel, *wanted.values()) if pin and store.find(pin.sha256, ".deb")}
    apt = Apt(architecture)
    ask = [name for name in names if name not in cached]
    if lock.kernel is None or lock.kernel.name not in cached:
        ask += [kernel, *([lock.kernel.name] if lock.kernel else [])]
    apt.learn(ask)
    chosen = [_choose_kernel(kernel, lock.kernel, cached, apt)]
    for name, pin in wanted.items():
        chosen.append(pin if pin is not None and name in cached else apt.choose(name, pin))
    _download([pin for pin in chosen if store.find(pin.sha256, ".deb") is None], architecture, store)
    fetched = []
    for pin in chosen:
        path = store.find(pin.sha256, ".deb")
        assert path is not None
        fetched.append(Fetched(pin, path, locked=pin in (lock.kernel, lock.package(pin.name))))
    return fetched


def _choose_kernel(metapackage: str, locked: Pin | None, cached: set[str], apt: Apt) -> Pin:
    if locked is not None and (locked.name in cached or apt.offers(locked)):
        return locked
    name = apt.kernel_of(metapackage)
    apt.learn([name])
    return apt.candidate(name)


def _download(pins: Sequence[Pin], architecture: str, store: Store) -> None:
    if not pins:
        return
    with tempfile.TemporaryDirectory(prefix="build-guest-") as scratch:
        done = subprocess.run(
            # The sandbox user could not write into a directory of ours, and apt warns about that.
            [
                "apt-get",
                "-q",
                "-o",
                "APT::Sandbox::User=root",
                "download",
                *(f"{p.name}={p.version}" for p in pins),
            ],
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise BuildError(
                f"apt-get download failed: {done.stderr.strip()}\n"
                "If a file was not found, the package lists are old: run `apt-get update` and start again."
            )
        for pin in pins:
            found = [path for path in Path(scratch).glob(f"{pin.name}_*.deb") if path.is_file()]
            if len(found) != 1:
                raise BuildError(
                    f"apt-get download {pin.name}={pin.version}: {len(found)} files came, expected 1"
                )
            store.add(found[0], pin.sha256, ".deb", f"{pin.name} {pin.version} ({architecture})")


def fetch_wheel(name: str, pin: Pin | None, store: Store) -> Fetched:
    """Get a wheel: the locked one, or (no pin) the newest that pip finds."""
    if pin is not None:
        cached = store.find(pin.sha256, ".whl")
        if cached is not None:
            return Fetched(pin, cached, locked=True)
    requirement = f"{name}=={pin.version} --hash=sha256:{pin.sha256}" if pin else name
    with tempfile.TemporaryDirectory(prefix="build-guest-") as scratch:
        (Path(scratch) / "requirements.txt").write_text(requirement + "\n")
        argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        argv += ["--platform", "manylinux2014_x86_64", "--python-version", "3.11", "--implementation", "cp"]
        argv += ["--abi", "abi3", "--abi", "none", "--dest", scratch, "-r", f"{scratch}/requirements.txt"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=scratch)
        if done.returncode != 0:
            if "No module named pip" in done.stderr:
                raise BuildError("pip is missing: apt-get install python3-pip")
            raise BuildError(f"pip could not fetch {requirement}: {done.stderr.strip()}")
        (wheel,) = Path(scratch).glob("*.whl")
        version = wheel.name.split("-")[1]
        found = Pin(name, version, digest_of(wheel))
        return Fetched(found, store.add(wheel, found.sha256, ".whl", name), locked=pin == found)
