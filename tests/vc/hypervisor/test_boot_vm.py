"""Real VMs: every way to fail between QEMU's start and the agent's answer.

What a VM does that has booted is the contract of the factories: tests/vc/factory/test_factory_contract.py.
"""

import os
import secrets
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.harness.vms import LIMIT, Traces, missing, run_in_guest, small_vm
from vc.beginning import Boot, TakeOver
from vc.errors import HypervisorError
from vc.hypervisor.base import Disk, VMConfig
from vc.storage.sharedfs import virtiofsd
from vc.vm import VM, boot_vm

pytestmark = pytest.mark.e2e


@pytest.fixture
def config(tmp_path: Path) -> VMConfig:
    if why := missing():
        pytest.skip(why)
    return small_vm(tmp_path / "run")


@pytest.fixture
def shared_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "shared"
    directory.mkdir()
    return directory


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


async def test_a_run_directory_with_a_long_path_works(config: VMConfig, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    config = replace(config, run_dir=deep, shared_fs=None, image=deep / "no-such.img")
    error = await fails_to_boot(config, Traces(deep))
    assert "no-such.img" in error
    shutil.rmtree(deep)


async def check_disks(vm: VM, directory: Path) -> None:
    """One to read and one to write, found by their serial numbers."""
    (directory / "read").write_bytes(b"from the host".ljust(1 << 20, b"."))
    (directory / "write").write_bytes(bytes(1 << 20))
    disks = [
        Disk(path=directory / "read", serial="to-read", read_only=True),
        Disk(path=directory / "write", serial="to-write"),
    ]
    for disk in disks:
        await vm.machine.plug(disk)
    script = """
        for disk in /sys/block/vd*; do
            case $(cat $disk/serial 2>/dev/null) in
                to-read) read=/dev/${disk##*/} ;;
                to-write) write=/dev/${disk##*/} ;;
            esac
        done
        head -c 13 $read; (echo x >$read) 2>/dev/null || echo " is read-only"
        echo from the guest | dd of=$write conv=fsync 2>/dev/null
    """
    assert await run_in_guest(vm, "/bin/busybox", "sh", "-c", script) == "from the host is read-only\n"
    for disk in disks:
        await vm.machine.unplug(disk)
    assert (directory / "write").read_bytes().startswith(b"from the guest\n")
    await vm.machine.plug(disks[0])  # its place is free again
    with pytest.raises(HypervisorError, match="'/no/such' cannot be plugged: No such file"):
        await vm.machine.plug(Disk(path=Path("/no/such"), serial="x"))


async def test_a_share_and_disks_are_plugged_into_a_running_vm_and_taken_away(
    config: VMConfig, shared_dir: Path, tmp_path: Path
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
        await check_disks(vm, tmp_path)
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
