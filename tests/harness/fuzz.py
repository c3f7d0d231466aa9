"""What reads others' bytes, as functions of bytes: for Hypothesis in the suite, and for long runs by atheris.

A target is called with any bytes at all. It returns, or raises `AssertionError` for a broken promise; any
other exception is a bug of what it called. Errors that the tested function promises are caught there, so that
each target is also the list of what its function may raise. What a run has found becomes a seed.

`python -m tests.harness.fuzz TARGET FILE` replays one input.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.harness import fuzz_lines, fuzz_words
from tests.harness.fuzz_inputs import TARGETS, Target

__all__ = ["TARGETS", "Target"]
TARGET_MODULES = (fuzz_lines, fuzz_words)  # to import one is to put its targets into the list


def main() -> None:
    """Run one target on one file."""
    name, path = sys.argv[1:]
    TARGETS[name].run(Path(path).read_bytes())


if __name__ == "__main__":
    main()
