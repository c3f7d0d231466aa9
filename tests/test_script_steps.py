"""A step of a script shows one line, what it has to tell its user, and all of its output only if it fails."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(body: str) -> subprocess.CompletedProcess[str]:
    script = f". scripts/lib.sh\nwork() {{\n{body}\n}}\nstep title work\n"
    argv = ["bash", "-c", script]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)


def test_what_a_step_tells_is_seen_and_what_it_prints_is_not() -> None:
    """That a configuration was changed and stays was said to nobody."""
    done = run("echo output; tell 'for the user'")
    assert (done.returncode, done.stderr) == (0, "for the user\n")
    assert done.stdout.startswith("title ") and done.stdout.count("\n") == 1


def test_all_that_a_step_printed_is_seen_when_it_fails() -> None:
    done = run("echo output; false; echo not reached")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "output"
    assert '"title" failed with status 1' in done.stderr and "not reached" not in done.stderr
