"""What the protocol core drags in: a guest pays for each import at each boot."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import protos.ttrpc.ttrpc_pb2
before = set(sys.modules)
import ttrpc.connection, ttrpc.methods
print(*sorted(name for name in set(sys.modules) - before if not name.startswith("ttrpc")))
print("dataclasses" in sys.modules, "trio" in sys.modules)
"""


def test_the_core_imports_nothing_that_protobuf_does_not_import_anyway() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["__future__", "False False"]
