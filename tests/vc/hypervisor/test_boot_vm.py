"""Real VMs: from QEMU's start to the agent's answer, and every way to fail on that path."""

import os
import secrets
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from vc.beginning import Boot, TakeOver
from vc.errors import GuestGone, HypervisorError
from vc.hypervisor.base import SharedFSConfig, VMConfig
from vc.storage.sharedfs import virtiofsd
from vc.vm import boot_vm

pytestmark = pytest.mark.e2e

GUEST = Path(os.environ.get("KATA_TEST_GUEST", Path(__file__).parents[3] / "build" / "guest"))
QEMU = Path("/usr/bin/qemu-system-x86_64")
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
LIMIT = 60  # seconds; what hangs is to fail and not to hang the tests


def missing() -> str:
    if os.geteuid() != 0:
        return "needs root"
    for thing in (QEMU, VIRTIOFSD, GUEST / "guest.json"):
        if not thing.exists():
            return f"{thing} is missing"
    return ""


@pytest.fixture
def config(tmp_path: Path) -> VMConfig:
    if why := missing():
        pytest.skip(why)
    kernel = next(GUEST.glob("vmlinu*"))
    return VMConfig(
        qemu=QEMU,
        kernel=kernel,
        initrd=GUEST / "initrd.img",
        image=GUEST / "rootfs.erofs",
        rootfs_type="erofs",
        memory_mib=256,
        accelerator="tcg",
        shared_fs=SharedFSConfig(daemon=VIRTIOFSD),
        run_dir=tmp_path / "run",
        dial_timeout=LIMIT,
    )


@pytest.fixture
def shared_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "shared"
    directory.mkdir()
    return directory


class Traces:
    """What a VM leaves on the host: to be nothing once its block has ended."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.vmid = secrets.token_hex(8)
        self.threads = self._threads()
        self.descriptors = self._descriptors()

    def _threads(self) -> set[str]:
        # trio keeps idle worker threads for a while
        return {thread.name for thread in threading.enumerate() if not thread.name.startswith("Trio thread")}

    def _descriptors(self) -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def processes(self) -> list[str]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if self.vmid.encode() in command:
                found.append(command.replace(b"\0", b" ").decode())
        return found

    def assert_none(self) -> None:
        assert self.processes() == []
        assert not list((self.run_dir / "vm").iterdir())
        assert self._threads() == self.threads
        assert self._descriptors() == self.descriptors


async def test_a_vm_boots_until_its_agent_answers_and_leaves_nothing(
    config: VMConfig, shared_dir: Path
) -> None:
    traces = Traces(config.run_dir)
    async with boot_vm(config, vmid=traces.vmid, netns="", shared_dir=shared_dir) as vm:
        await vm.agent.check()
        assert vm.details.agent_details.version
        assert 0 < vm.times.launched < vm.times.reached < vm.times.ready
        assert len(traces.processes()) >= 2
        directory = config.run_dir / "vm" / traces.vmid
        assert directory.stat().st_mode & 0o777 == 0o700
        for name in ("qmp.sock", "agent.sock", "virtiofs.sock"):
            assert (directory / name).stat().st_mode & 0o777 == 0o600
        assert Path(f"/proc/{vm.machine.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
        status = Path(f"/proc/{vm.machine.pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status and "Seccomp:\t2" in status
        # Pause and resume go through QMP.
        await vm.machine.pause()
        with trio.move_on_after(0.2) as paused:
            await vm.agent.check()
        assert paused.cancelled_caught
        await vm.machine.resume()
        await vm.agent.check()
    traces.assert_none()


async def test_a_killed_vmm_is_known_at_once_to_all_who_wait(config: VMConfig, shared_dir: Path) -> None:
    traces = Traces(config.run_dir)
    heard: list[str] = []
    async with (
        boot_vm(config, vmid=traces.vmid, netns="", shared_dir=shared_dir) as vm,
        trio.open_nursery() as nursery,
    ):

        async def wait_for_the_guest() -> None:
            with pytest.raises(GuestGone) as caught:
                await vm.agent.wait_oom()
            heard.append(str(caught.value))

        nursery.start_soon(wait_for_the_guest)
        await vm.agent.check()
        os.kill(vm.machine.pid, signal.SIGKILL)
        with trio.fail_after(10):
            gone = await vm.wait_gone()
            while not heard:
                await trio.lowlevel.checkpoint()
        assert "was killed by SIGKILL" in str(gone)
        assert "was killed by SIGKILL" in heard[0]
        with pytest.raises(GuestGone):
            await vm.agent.check()
        with pytest.raises(HypervisorError, match="was killed by SIGKILL"):
            await vm.machine.pause()
    traces.assert_none()


async def test_the_death_of_virtiofsd_is_the_end_of_the_vm(config: VMConfig, shared_dir: Path) -> None:
    traces = Traces(config.run_dir)
    async with boot_vm(config, vmid=traces.vmid, netns="", shared_dir=shared_dir) as vm:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if command.startswith(str(VIRTIOFSD).encode()) and traces.vmid.encode() in command:
                os.kill(int(entry.name), signal.SIGKILL)
        with trio.fail_after(10):
            assert "virtiofsd" in str(await vm.wait_gone())
    traces.assert_none()


async def fails_to_boot(config: VMConfig, traces: Traces) -> str:
    with pytest.raises(HypervisorError) as caught, trio.fail_after(LIMIT + 20):
        async with boot_vm(config, vmid=traces.vmid, netns="", shared_dir=None):
            pytest.fail("it booted")
    traces.assert_none()
    return str(caught.value)


async def test_a_missing_image_is_named(config: VMConfig, tmp_path: Path) -> None:
    traces = Traces(config.run_dir)
    error = await fails_to_boot(replace(config, image=tmp_path / "no-such.img"), traces)
    assert f"VM {traces.vmid} did not boot" in error
    assert "exited with status 1" in error and "no-such.img" in error and "check kernel" in error


async def test_a_kernel_that_is_none_is_told_by_qemu(config: VMConfig, tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"this is no kernel" * 1000)
    error = await fails_to_boot(replace(config, kernel=kernel), Traces(config.run_dir))
    assert "exited with status 1" in error and "kernel" in error


async def test_a_broken_initrd_ends_in_the_kernels_own_words(config: VMConfig, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd.img"
    initrd.write_bytes(b"this is no initrd" * 1000)
    error = await fails_to_boot(replace(config, initrd=initrd), Traces(config.run_dir))
    assert "Kernel panic - not syncing" in error and "the guest restarted itself" in error


async def test_a_guest_without_agent_runs_into_the_time_limit(config: VMConfig) -> None:
    # The kernel stays in its panic: the default of panic= is to wait for ever.
    config = replace(config, initrd=None, kernel_params=("panic=0",), dial_timeout=8)
    error = await fails_to_boot(config, Traces(config.run_dir))
    assert "its agent does not answer" in error and "dial_timeout" in error


async def test_a_cancelled_boot_leaves_nothing(config: VMConfig, shared_dir: Path) -> None:
    traces = Traces(config.run_dir)
    with trio.move_on_after(0.5) as scope:
        async with boot_vm(config, vmid=traces.vmid, netns="", shared_dir=shared_dir):
            pytest.fail("it booted in half a second")
    assert scope.cancelled_caught
    traces.assert_none()


async def test_a_run_directory_with_a_long_path_works(config: VMConfig, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    config = replace(config, run_dir=deep, shared_fs=None, image=deep / "no-such.img")
    error = await fails_to_boot(config, Traces(deep))
    assert "no-such.img" in error
    shutil.rmtree(deep)


async def test_a_share_is_plugged_into_a_running_vm_and_taken_away(
    config: VMConfig, shared_dir: Path
) -> None:
    traces = Traces(config.run_dir)
    assert config.shared_fs is not None
    async with boot_vm(config, vmid=traces.vmid, netns="") as vm:
        directory = config.run_dir / "vm" / traces.vmid
        async with virtiofsd(config.shared_fs, shared_dir, directory / "virtiofs.sock") as share:
            await vm.machine.plug(share.device)
            await vm.agent.check()
            await vm.machine.unplug(share.device)
            await vm.agent.check()
    traces.assert_none()


async def test_a_parked_vm_goes_on_with_its_next_owner_and_ends_with_it(
    config: VMConfig, shared_dir: Path
) -> None:
    traces = Traces(config.run_dir)
    parked_as = secrets.token_hex(8)
    async with boot_vm(config, vmid=parked_as, netns="", beginning=Boot(kept=True)) as vm:
        parked = await vm.park()
    old, new = (config.run_dir / "vm" / name for name in (parked_as, traces.vmid))
    assert old.is_dir() and Path(f"/proc/{parked.pid}").exists()
    assert {
        os.getpriority(os.PRIO_PROCESS, int(task.name)) for task in Path(f"/proc/{parked.pid}/task").iterdir()
    } == {os.getpriority(os.PRIO_PROCESS, 0)}
    async with boot_vm(config, vmid=traces.vmid, shared_dir=shared_dir, beginning=TakeOver(parked)) as vm:
        assert vm.machine.pid == parked.pid
        assert new.is_dir() and not old.exists()
        await vm.agent.check()
        assert vm.details.agent_details.version
        os.kill(parked.pid, signal.SIGKILL)
        with trio.fail_after(LIMIT):
            assert "was killed by SIGKILL" in str(await vm.wait_gone())
    parked.close()
    traces.assert_none()
