"""A template is made by a process of its own, that has nothing of ours."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from vc.factory import later
from vc.factory.later import Later, maker_command

CONFIG = Path("/etc/some.toml")

# Tells what it was given, then waits until it may end.
SCRIPT = """#!/bin/sh
exec 3>"$0.told.new"
echo "$@" >&3
ls -l /proc/$$/fd >&3
cut -d ' ' -f 1,6 /proc/$$/stat >&3
mv "$0.told.new" "$0.told"
read _ <"$0.go"
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A maker beside the program that we are taken for."""
    path = tmp_path / "kata-runtime"
    path.write_text(SCRIPT)
    path.chmod(0o755)
    os.mkfifo(tmp_path / "kata-runtime.go")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "containerd-shim-kata-v2")])
    return path


@pytest.fixture
def no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "something")])
    monkeypatch.setenv("PATH", str(tmp_path))


async def until(look: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not look():
            await trio.sleep(0.01)  # nothing tells


async def started(program: Path) -> list[str]:
    told = Path(f"{program}.told")
    await until(told.exists)
    return told.read_text().splitlines()


def let_end(program: Path) -> None:
    with Path(f"{program}.go").open("w") as go:
        go.write("\n")


def test_the_program_beside_us_is_taken(program: Path) -> None:
    assert maker_command(CONFIG) == [
        str(program), "--config", str(CONFIG), "factory", "init", "--background"
    ]  # fmt: skip


def test_without_the_program_nothing_is_asked(no_program: None) -> None:
    assert maker_command(CONFIG) is None
    assert Later(CONFIG).ask() is None


async def test_it_runs_detached_and_inherits_nothing(program: Path, tmp_path: Path) -> None:
    kept = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(kept, True)
    try:
        Later(CONFIG).ask_and_leave()
        arguments, *lines, identity = await started(program)
    finally:
        os.close(kept)
        let_end(program)
    assert arguments == f"--config {CONFIG} factory init --background"
    targets = {line.rpartition(" ")[2] for line in lines if "->" in line}
    assert targets <= {"/dev/null", f"{program}.told.new", str(program)}
    pid, session = identity.split()
    assert pid == session
    # Nobody waits for it in this test, so it is reaped here.
    os.waitpid(int(pid), 0)


async def test_it_is_asked_for_once_and_reaped(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(later, "DELAY", 0.0)
    once = Later(CONFIG)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(once.run)
        pid = int((await started(program))[-1].split()[0])
        assert once.ask() is None
        let_end(program)
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


async def test_the_end_of_the_vm_leaves_it_running(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(later, "DELAY", 0.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Later(CONFIG).run)
        pid = int((await started(program))[-1].split()[0])
        nursery.cancel_scope.cancel()
    assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    let_end(program)
    os.waitpid(pid, 0)
