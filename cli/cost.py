"""What a process costs the host in memory, guests' memory included.

A guest's memory is a file without a name (memfd), which the VMM maps. What another process wrote there, such
as the saved memory of a template, counts for nobody until the VMM touches it. So the file is asked how large
it is, and of the mappings only the rest is counted.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

BLOCK = 512  # bytes: stat(2), st_blocks
MEMFD = "/memfd:"  # proc(5), what a link in /proc/PID/fd says


def host_memory(pid: int) -> int:
    """Return how many bytes of the host's memory a process holds; 0 if it is gone or not ours to look at."""
    process = Path(f"/proc/{pid}")
    try:
        private = parse_private((process / "smaps_rollup").read_text())
        files: dict[int, int] = {}
        for entry in (process / "fd").iterdir():
            with suppress(FileNotFoundError):  # it was closed meanwhile
                if str(entry.readlink()).startswith(MEMFD):
                    found = entry.stat()
                    files[found.st_ino] = found.st_blocks * BLOCK
    except OSError:
        return 0
    return private + sum(files.values())


def parse_private(text: str) -> int:
    """Return the proportional size in bytes of all but shared memory: proc(5), /proc/PID/smaps_rollup."""
    return sum(1024 * int(kib) for kib in re.findall(r"^Pss_(?:Anon|File): +(\d+) kB$", text, re.MULTILINE))
