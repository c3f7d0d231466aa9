"""Letting a created container's init process go: the byte in the fifo that crun has left for it."""

import os
from pathlib import Path

from agent.runtime import release


def test_an_init_process_that_waits_gets_its_byte_and_the_fifo_is_gone(tmp_path: Path) -> None:
    fifo = tmp_path / "exec.fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert release(str(fifo))
        assert len(os.read(reader, 10)) == 1
        assert not fifo.exists()  # by which crun tells a running container from a created one
    finally:
        os.close(reader)


def test_a_fifo_that_nobody_reads_is_left_to_crun(tmp_path: Path) -> None:
    fifo = tmp_path / "exec.fifo"
    os.mkfifo(fifo)
    assert not release(str(fifo))
    assert fifo.exists()


def test_a_crun_that_leaves_no_fifo_is_asked_itself(tmp_path: Path) -> None:
    assert not release(str(tmp_path / "exec.fifo"))
