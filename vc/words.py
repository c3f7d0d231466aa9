"""Words of others, the guest above all, made fit to be shown: on one line, without control characters, short.

They end up in containerd's log and on the terminals of its clients.
"""

from __future__ import annotations

import re

MAX_CHARACTERS = 4096  # of a reason that the guest gives; crun's longest have some hundred

# Control sequences (ECMA-48, 5.4: CSI; 5.6: OSC and its like), with which firmware clears the screen and
# programs colour words: they say nothing to a reader of the line.
CONTROL = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[PX\]^_][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-Z\\-~])")


def printable(data: bytes) -> str:
    """Decode bytes without control sequences; what else is not printable becomes an escape."""
    text = CONTROL.sub(b"", data).decode("utf-8", "backslashreplace").replace("\t", "    ")
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )


def reason(text: str) -> str:
    """Return what the guest gave as a reason; lines become parts of one."""
    lines = (line.strip() for line in text[:MAX_CHARACTERS].splitlines())
    shown = printable(" | ".join(line for line in lines if line).encode("utf-8", "backslashreplace"))
    return shown if len(text) <= MAX_CHARACTERS >= len(shown) else shown[:MAX_CHARACTERS] + "..."
