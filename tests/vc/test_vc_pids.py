"""A process of the right id is killed, and another one that has got its id is not."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vc.pids import argv_of, kill, start_ticks


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sh", "-c", "read line"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_process_is_killed_that_is_the_one_which_is_meant(process: subprocess.Popen[bytes]) -> None:
    started = start_ticks(process.pid)
    assert kill(process.pid, lambda: start_ticks(process.pid) == started, wait=10)
    assert process.wait() == -signal.SIGKILL


def test_a_process_that_has_got_the_id_of_another_lives(process: subprocess.Popen[bytes]) -> None:
    started = start_ticks(process.pid) - 1
    assert kill(process.pid, lambda: start_ticks(process.pid) == started, wait=10)
    process.communicate(b"\n")
    assert process.returncode == 0


def test_one_that_is_gone_counts_as_ended_and_is_asked_nothing(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert kill(process.pid, pytest.fail)
    assert (start_ticks(process.pid), argv_of(process.pid)) == (0, [])


def test_the_name_of_a_program_does_not_disturb_the_reading_of_its_start() -> None:
    comm = Path("/proc/self/comm")
    name, before = comm.read_text(), start_ticks(os.getpid())
    try:
        comm.write_text("a ) R 1 2 (b")
        assert start_ticks(os.getpid()) == before > 0
    finally:
        comm.write_text(name)
