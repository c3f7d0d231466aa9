"""Real processes under a keeper: who holds the lease owns them, and they end with the last one who does."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from vc.errors import HypervisorError
from vc.hypervisor.children import prefix
from vc.hypervisor.lease import KEEPER, keeper_of, leased, taken
from vc.hypervisor.parked import close_all, duplicate

LIMIT = 20  # seconds; what hangs is to fail and not to hang the tests
SLEEP = [*prefix(capabilities=True), "sleep", "1000"]


@pytest.fixture
def vm_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "abc123"
    directory.mkdir()
    (directory / "lock").touch()
    return directory


async def wait_ended(pidfd: int) -> None:
    with trio.fail_after(LIMIT):
        await trio.lowlevel.wait_readable(pidfd)


async def wait_removed(directory: Path) -> None:
    with trio.fail_after(LIMIT):
        while directory.exists():
            await trio.sleep(0.01)  # nothing tells


async def test_the_end_of_the_block_ends_the_process_and_its_keeper(vm_dir: Path) -> None:
    descriptors = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    async with leased(SLEEP, name="thing", vm_dir=vm_dir) as child:
        keeper = os.pidfd_open(keeper_of(child.pid))
        command = Path(f"/proc/{keeper_of(child.pid)}/cmdline").read_bytes()
        assert b"\0sandbox-abc123," in command
    assert child.exit_status == -signal.SIGKILL
    await wait_ended(keeper)
    os.close(keeper)
    assert vm_dir.exists(), "it is the owner's, who lives"
    assert set(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


async def test_how_a_process_ended_is_told_through_its_keeper(vm_dir: Path) -> None:
    argv = [*prefix(capabilities=True), "sh", "-c", "echo last words >&2; exit 7"]
    async with leased(argv, name="thing", vm_dir=vm_dir) as child:
        with trio.fail_after(LIMIT):
            cause = await child.wait_dead()
    assert cause == f"thing (pid {child.pid}) exited with status 7: last words"


async def test_a_process_whose_keeper_is_killed_dies_with_it(vm_dir: Path) -> None:
    async with leased(SLEEP, name="thing", vm_dir=vm_dir) as child:
        os.kill(keeper_of(child.pid), signal.SIGKILL)
        with trio.fail_after(LIMIT):
            assert "ended with the process that kept it" in await child.wait_dead()


async def test_a_process_that_its_keepers_death_does_not_kill_is_killed(vm_dir: Path) -> None:
    """A keeper may be killed before its process has asked the kernel to die with it."""
    async with leased(["sleep", "1000"], name="thing", vm_dir=vm_dir) as child:
        os.kill(keeper_of(child.pid), signal.SIGKILL)
        with trio.fail_after(LIMIT):
            assert "ended with the process that kept it" in await child.wait_dead()


async def test_a_parked_process_lives_on_until_the_next_owner_lets_go(vm_dir: Path) -> None:
    async with leased(SLEEP, name="thing", vm_dir=vm_dir) as child:
        lease, pidfd = duplicate(child.lease, child.pidfd)
        stderr = os.open(os.devnull, os.O_RDONLY)
        child.parked = True
    assert child.exit_status is None
    async with taken("thing", child.pid, pidfd=pidfd, lease=lease, stderr=stderr) as owned:
        os.kill(child.pid, signal.SIGTERM)
        with trio.fail_after(LIMIT):
            assert "was killed by SIGTERM" in await owned.wait_dead()
    close_all([lease, pidfd, stderr])


async def test_a_process_ends_when_the_last_lease_is_closed_and_its_directory_goes(vm_dir: Path) -> None:
    async with leased(SLEEP, name="thing", vm_dir=vm_dir) as child:
        first, second, pidfd = duplicate(child.lease, child.lease, child.pidfd)
        child.parked = True
    os.close(first)
    signal.pidfd_send_signal(pidfd, 0)  # it lives
    os.close(second)
    await wait_ended(pidfd)
    await wait_removed(vm_dir)
    os.close(pidfd)


async def test_a_directory_that_the_next_owner_renamed_is_left_alone(vm_dir: Path) -> None:
    async with leased(SLEEP, name="thing", vm_dir=vm_dir) as child:
        keeper = os.pidfd_open(keeper_of(child.pid))
        lease, pidfd = duplicate(child.lease, child.pidfd)
        child.parked = True
    renamed = vm_dir.rename(vm_dir.with_name("def456"))
    os.close(lease)
    await wait_ended(keeper)
    assert (renamed / "lock").exists()
    close_all([keeper, pidfd])


async def test_the_process_has_its_descriptors_and_the_keeper_has_none_of_them(vm_dir: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        script = f"echo hello >&{theirs.fileno()}; read forever <&{theirs.fileno()}"
        argv = [*prefix(capabilities=True), "bash", "-c", script]
        async with leased(argv, name="thing", vm_dir=vm_dir, pass_fds=[theirs.fileno()]) as child:
            theirs.close()
            assert ours.recv(100) == b"hello\n"
            keeper = keeper_of(child.pid)
            assert len(list(Path(f"/proc/{keeper}/fd").iterdir())) == 5, "its stdio, the lease and the pidfd"
            assert keeper_of(keeper) != os.getpid(), "whoever owns it later could not reap it"
            os.kill(child.pid, signal.SIGKILL)
            assert ours.recv(100) == b"", "nobody else holds the other end"


async def test_a_program_that_does_not_exist_is_named(vm_dir: Path) -> None:
    with pytest.raises(HypervisorError, match="cannot start thing: /no/such/program: No such file"):
        async with leased(["/no/such/program"], name="thing", vm_dir=vm_dir):
            pass


OWNER = """
import sys, trio
from pathlib import Path
from vc.hypervisor.children import prefix
from vc.hypervisor.lease import leased
async def main():
    argv = [*prefix(capabilities=True), "sleep", "1000"]
    async with leased(argv, name="thing", vm_dir=Path(sys.argv[1])) as child:
        print(child.pid, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


async def test_a_process_dies_with_an_owner_that_is_killed(vm_dir: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, str(vm_dir)], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        pidfd = os.pidfd_open(int(owner.stdout.readline()))
        owner.kill()
        await wait_ended(pidfd)
        await wait_removed(vm_dir)
        os.close(pidfd)


def test_a_keeper_imports_next_to_nothing() -> None:
    script = "import sys; exec(sys.stdin.read(), {'__name__': 'keeper'}); print(*sys.modules)"
    argv = [sys.executable, "-I", "-S", "-c", script]
    words = subprocess.run(argv, input=KEEPER.read_bytes(), capture_output=True, check=True)
    assert b"select" in words.stdout
    assert not {"signal", "socket", "enum", "site", "re"} & set(words.stdout.decode().split())
