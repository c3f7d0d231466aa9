"""What `check` and `env` ask of this host. Rule: nothing here fails; what cannot be found out is empty."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

VERSION_TIMEOUT = 10.0  # seconds for `PROGRAM --version`, on a host that may be busy emulating


def first_line(argv: Sequence[str]) -> str:
    """Return the first line that a program prints, on either stream."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=VERSION_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""
    lines = done.stdout.decode("utf-8", "replace").strip().splitlines()
    return lines[0].strip() if lines else ""


def program_version(program: Path) -> str:
    """Return what a program says about its version."""
    return first_line([str(program), "--version"])


def meminfo() -> dict[str, int]:
    """Return /proc/meminfo: names to KiB."""
    found = {}
    for line in read_text(Path("/proc/meminfo")).splitlines():
        name, _, rest = line.partition(":")
        if (number := rest.split()) and number[0].isdigit():
            found[name] = int(number[0])
    return found


def cpuinfo() -> dict[str, str]:
    """Return the fields of the first CPU in /proc/cpuinfo."""
    first, _, _ = read_text(Path("/proc/cpuinfo")).partition("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def os_release() -> dict[str, str]:
    """Return the distribution's own description."""
    pairs = (line.partition("=") for line in read_text(Path("/etc/os-release")).splitlines())
    return {name: value.strip("\"'") for name, _, value in pairs if value}


def read_text(path: Path) -> str:
    """Return a file's text, or nothing."""
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def file_size(path: Path) -> int:
    """Return a file's size in bytes, or 0."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0
