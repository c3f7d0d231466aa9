"""What the guest pays for at each boot."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("trio", "asyncio", "typing", "dataclasses", "enum", "re", "collections", "socket", "threading")


def test_the_pure_modules_import_next_to_nothing() -> None:
    pure = ["frames", "window", "stream", "connection", "resync", "buffer", "turns", "events", "errors"]
    code = f"import sys\nimport {', '.join('yamux.' + name for name in pure)}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "yamux" in loaded
    assert loaded.isdisjoint(HEAVY)
