"""What the agent costs until it serves, and its command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import google.protobuf
import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON_PATH = f"{ROOT}:{Path(google.protobuf.__file__).parents[2]}"

# Each of these costs more than all of the agent's own modules, or is not in the guest's Python at all.
UNWANTED = {
    "argparse",
    "asyncio",
    "concurrent",
    "ctypes",
    "dataclasses",
    "importlib.util",
    "inspect",
    "json",
    "logging",
    "pathlib",
    "pyroute2",
    "re",
    "shutil",
    "signal",
    "socket",
    "subprocess",
    "tempfile",
    "traceback",
    "trio",
    "google.protobuf.internal.python_message",
    "google.protobuf.descriptor_pb2",
    "google.protobuf.text_format",
}

START = """
import sys
import agent.__main__
from agent import lightproto, main
assert lightproto.install()
main.build(sys.argv[1], {})
import agent.multiplex
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env={"PYTHONPATH": PYTHON_PATH, "PATH": os.environ["PATH"]},
    )


def test_an_agent_that_is_about_to_serve_has_imported_little(tmp_path: Path) -> None:
    code = START + "print(*sorted(sys.modules))\nprint(type(sys.modules['typing']).__module__)"
    done = run(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    modules, typing = done.stdout.splitlines()
    assert UNWANTED & set(modules.split()) == set()
    assert typing == "agent.lighttyping"


def test_messages_work_without_protobufs_python_half(tmp_path: Path) -> None:
    code = START + (
        "from agent.schema import agent, types, EMPTY\n"
        "stats = agent.MemoryStats(stats={'a': 1}, usage=agent.MemoryData(limit=5))\n"
        "stats.stats['b'] = 2\n"
        "copy = agent.MemoryStats.FromString(stats.SerializeToString())\n"
        "assert copy == stats and dict(copy.stats) == {'a': 1, 'b': 2} and copy.usage.limit == 5\n"
        "assert types.IPFamily.Name(1) == 'v6' and agent.VolumeUsage.INODES == 2\n"
        "assert EMPTY.SerializeToString() == b''\n"
        "answer = agent.WaitProcessResponse(status=1, stdout_bytes=None)\n"
        "assert not answer.HasField('stdout_bytes')\n"
    )
    done = run(code, str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_who_wants_more_of_typing_gets_the_real_one() -> None:
    code = (
        "from agent import lighttyping\nlighttyping.install()\n"
        "from typing import Generic, TypeVar, cast\n"
        "class C(Generic[TypeVar('T')]): pass\n"
        "assert C[int]() and cast('x', 5) == 5\n"
        "from typing import NamedTuple, get_type_hints\n"
        "assert NamedTuple('N', [('a', int)])(1).a == 1\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "target", [["-m", "agent"], [str(ROOT / "agent")], [str(ROOT / "agent/__main__.py")]], ids=str
)
def test_the_program_starts_from_wherever_it_is(target: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", *target, "--version"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)} if target[0] == "-m" else {},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("agent ")


@pytest.mark.parametrize("arguments", [[], ["--listen"], ["--listen", "tcp:1"], ["--what"]], ids=str)
def test_a_command_line_that_makes_no_sense_is_explained(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "agent"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "usage: agent" in done.stderr
