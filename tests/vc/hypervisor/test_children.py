"""Real child processes: started, watched, ended, and nothing left of them."""

import os
import resource
import signal
from pathlib import Path

import pytest
import trio

from vc.errors import HypervisorError
from vc.hypervisor.children import describe_exit, prefix, running


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_how_a_process_ended_is_told_with_its_last_words() -> None:
    argv = [*prefix(capabilities=True), "sh", "-c", "echo first; echo last >&2; exit 7"]
    async with running(argv, name="thing") as child:
        cause = await child.wait_dead()
    assert cause == f"thing (pid {child.pid}) exited with status 7: first | last"


async def test_a_killed_process_is_noticed() -> None:
    async with running([*prefix(capabilities=True), "sleep", "1000"], name="thing") as child:
        os.kill(child.pid, signal.SIGKILL)
        assert "was killed by SIGKILL" in await child.wait_dead()
    assert not is_alive(child.pid)


async def test_the_end_of_the_block_ends_the_process_also_when_cancelled() -> None:
    descriptors = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with trio.CancelScope() as scope:
        async with running([*prefix(capabilities=True), "sleep", "1000"], name="thing") as child:
            scope.cancel()
            await trio.sleep_forever()
    assert not is_alive(child.pid)
    assert set(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


async def test_an_exception_of_the_block_comes_out_as_it_was() -> None:
    with pytest.raises(ZeroDivisionError):
        async with running([*prefix(capabilities=True), "sleep", "1000"], name="thing") as child:
            raise ZeroDivisionError
    assert not is_alive(child.pid)


async def test_a_child_may_open_as_many_files_as_is_allowed_at_all() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        argv = [*prefix(capabilities=True), "sh", "-c", "ulimit -S -n"]
        async with running(argv, name="thing") as child:
            await child.wait_dead()
        assert child.stderr.lines() == [str(hard)]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_child_gets_the_descriptors_it_is_meant_to_get_and_no_others() -> None:
    ours, theirs = os.pipe()
    argv = [*prefix(capabilities=True), "sh", "-c", "echo /proc/self/fd/*"]
    try:
        async with running(argv, name="thing", pass_fds=[theirs]) as child:
            await child.wait_dead()
    finally:
        os.close(ours)
        os.close(theirs)
    numbers = {int(Path(name).name) for name in child.stderr.lines()[0].split()}
    assert theirs in numbers and ours not in numbers


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_a_child_without_need_has_no_capability_and_its_own_network() -> None:
    script = "grep -E 'Cap(Prm|Eff|Bnd|Inh)|NoNewPrivs' /proc/self/status; readlink /proc/self/ns/net"
    async with running([*prefix(netns=""), "sh", "-c", script], name="thing") as child:
        await child.wait_dead()
    *status, network = child.stderr.lines()
    assert {line.split()[1] for line in status} == {"0000000000000000", "1"}
    assert network != str(Path("/proc/self/ns/net").readlink())


async def test_a_program_that_does_not_exist_is_named() -> None:
    with pytest.raises(HypervisorError, match="/no/such/program"):
        async with running(["/no/such/program"], name="thing"):
            pass


@pytest.mark.parametrize(
    ("status", "said"), [(0, "exited with status 0"), (-9, "was killed by SIGKILL"), (-64, "SIGRTMAX")]
)
def test_an_exit_in_words(status: int, said: str) -> None:
    assert said in describe_exit("thing", 1, status)
