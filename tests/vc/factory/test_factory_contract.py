"""What every factory promises of the VMs that it hands out, wherever they come from."""

import math
import os
import re
import secrets
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.harness.vms import LIMIT, VIRTIOFSD, Traces, missing, prepare_guest, run_in_guest, small_vm
from vc.background import background
from vc.errors import GuestGone, HypervisorError
from vc.factory import Factory, cacheserver
from vc.factory.cache import CacheFactory
from vc.factory.direct import DirectFactory
from vc.factory.handover import cache_key
from vc.factory.identity import identify
from vc.factory.maker import make_template
from vc.factory.template import TemplateFactory
from vc.factory.templates import Templates
from vc.hypervisor.accelerator import PARALLEL_TCG, qemu_version
from vc.hypervisor.base import VMConfig
from vc.hypervisor.qemu import hotplug
from vc.storage.share import GUEST_SHARE
from vc.vm import VM

pytestmark = pytest.mark.e2e

# What must not be the same in two guests, a line each: random bytes, two kinds of UUID, its name, whether it
# has a machine id, and what its secrets add to the sequence numbers of four TCP connections. A number is a
# hash of addresses, ports and a secret, plus the time in units of 64 ns: Linux, net/core/secure_seq.c.
IDENTITIES = """
import os, socket, time
print(os.getrandom(16).hex())
with open("/dev/urandom", "rb") as file: print(file.read(16).hex())
for name in "uuid", "boot_id": print(open("/proc/sys/kernel/random/" + name).read().strip())
print(os.uname().nodename)
print(os.path.exists("/etc/machine-id"))
sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
sniffer.bind(("lo", 0))
for port in range(40000, 40004):
    connection = socket.socket()
    connection.bind(("127.0.0.1", port))
    try: connection.connect(("127.0.0.1", 40010))
    except OSError: pass
    now = time.time_ns() >> 6
    connection.close()
    while True:
        packet = sniffer.recv(2048)[14:]
        if packet[9] == 6 and packet[33] == 2 and int.from_bytes(packet[20:22], "big") == port: break
    print((int.from_bytes(packet[24:28], "big") - now) % 2**32)
"""
DIRECT, TEMPLATE, CACHE = "direct", "template", "cache"
SECOND = 10**9 >> 6  # in the units of sequence numbers


@pytest.fixture
def config(tmp_path: Path) -> VMConfig:
    if why := missing():
        pytest.skip(why)
    return small_vm(tmp_path / "run")


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Templates]:
    """A place for templates, with one of the VM of all tests in it."""
    if why := missing():
        pytest.skip(why)
    directory = tmp_path_factory.mktemp("factory")
    templates = Templates(directory / "templates")
    trio.run(make_template, small_vm(directory / "run"), templates)
    yield templates
    with templates.locked(wait=True):
        templates.remove_all()


@pytest.fixture(params=[DIRECT, TEMPLATE, CACHE])
def start(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
async def factory(
    start: str,
    templates: Templates,
    config: VMConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Factory]:
    if start == DIRECT:
        yield DirectFactory()
    elif start == TEMPLATE:
        yield TemplateFactory(templates, config)
    else:
        monkeypatch.setattr(cacheserver, "REFILL_DELAY", math.inf)  # one is enough
        endpoint = tmp_path / "cache" / "cache.sock"
        pool = cacheserver.Pool(TemplateFactory(templates, config, kept=True), config, 1)
        with ExitStack() as stack:
            listener = cacheserver.listen_at(stack, endpoint)
            async with background() as serving:
                serving.start_soon(cacheserver.hand_over, listener, pool, cache_key(config))
                await serving.start(pool.fill)
                yield CacheFactory(endpoint, config, NoFactory())


class NoFactory:
    """Who is asked when nothing comes from where it should. See `vc.factory.Factory`."""

    def vm(
        self, config: VMConfig, *, vmid: str, netns: str | None, shared_dir: Path | None
    ) -> AbstractAsyncContextManager[VM]:
        pytest.fail("the cache gave no VM")


@pytest.fixture
def shared_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "shared"
    directory.mkdir()
    return directory


# What is true of a VM that boots, or does not apply to one.
COPIES = pytest.mark.parametrize("start", [TEMPLATE])


async def test_a_vm_serves_shares_stands_still_and_leaves_nothing(
    factory: Factory, start: str, config: VMConfig, shared_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    traces = Traces(config.run_dir)
    async with factory.vm(config, vmid=traces.vmid, netns="", shared_dir=shared_dir) as vm:
        assert ("goes on from template" in caplog.text) == (start == TEMPLATE)
        assert vm.vmid == traces.vmid
        await vm.agent.check()
        assert vm.details.agent_details.version
        assert 0 < vm.times.launched < vm.times.reached < vm.times.ready
        # Its processes, its place and its sockets have its name, and are ours alone.
        processes = traces.processes()
        if start != CACHE:  # the name on the command line cannot be changed
            assert f"-name sandbox-{traces.vmid}," in processes[vm.machine.pid]
        directory = config.run_dir / "vm" / traces.vmid
        assert directory.stat().st_mode & 0o777 == 0o700
        for name in ("qmp.sock", "agent.sock", "virtiofs.sock"):
            assert (directory / name).stat().st_mode & 0o777 == 0o600
        assert Path(f"/proc/{vm.machine.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
        status = Path(f"/proc/{vm.machine.pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status and "Seccomp:\t2" in status
        # What is shared can be mounted, and carries bytes both ways.
        (shared_dir / "from-host").write_bytes(content := secrets.token_hex(1 << 19).encode())
        await prepare_guest(vm)
        await run_in_guest(vm, "/bin/busybox", "cp", "/mnt/from-host", "/mnt/from-guest", share=".")
        assert (shared_dir / "from-guest").read_bytes() == content
        # Pause and resume go through QMP.
        await vm.machine.pause()
        with trio.move_on_after(0.2) as paused:
            await vm.agent.check()
        assert paused.cancelled_caught
        await vm.machine.resume()
        await vm.agent.check()
    traces.assert_none()


async def test_a_killed_vmm_is_known_at_once_to_all_who_wait(
    factory: Factory, config: VMConfig, shared_dir: Path
) -> None:
    traces = Traces(config.run_dir)
    heard: list[str] = []
    async with (
        factory.vm(config, vmid=traces.vmid, netns="", shared_dir=shared_dir) as vm,
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


async def test_the_death_of_virtiofsd_is_the_end_of_the_vm(
    factory: Factory, config: VMConfig, shared_dir: Path
) -> None:
    traces = Traces(config.run_dir)
    async with factory.vm(config, vmid=traces.vmid, netns="", shared_dir=shared_dir) as vm:
        for pid, command in traces.processes().items():
            if command.startswith(str(VIRTIOFSD)):
                os.kill(pid, signal.SIGKILL)
        with trio.fail_after(10):
            assert "virtiofsd" in str(await vm.wait_gone())
    traces.assert_none()


async def test_a_start_that_is_cancelled_leaves_nothing(
    factory: Factory, start: str, config: VMConfig, shared_dir: Path
) -> None:
    traces = Traces(config.run_dir)
    begun = "virtiofsd" if start == CACHE else "-name sandbox-"
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:

            async def begin() -> None:
                async with factory.vm(config, vmid=traces.vmid, netns="", shared_dir=shared_dir):
                    pytest.fail("it was to be cancelled")

            nursery.start_soon(begin)
            while not any(begun in command for command in traces.processes().values()):
                await trio.sleep(0.001)  # nothing tells
            nursery.cancel_scope.cancel()
    traces.assert_none()


@pytest.mark.parametrize("start", [TEMPLATE, CACHE])
async def test_a_vm_that_is_to_be_larger_grows_and_need_not_boot(
    factory: Factory, start: str, config: VMConfig, shared_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What virtiofsd reads and writes lies in the new memory, of which it got to know only then."""
    caplog.set_level("INFO")
    vcpus = 2 if qemu_version(config.qemu) >= PARALLEL_TCG else 1
    larger = replace(config, vcpus=vcpus, memory_mib=config.memory_mib + 100)
    traces = Traces(config.run_dir)
    async with factory.vm(larger, vmid=traces.vmid, netns="", shared_dir=shared_dir) as vm:
        assert ("goes on from template" if start == TEMPLATE else "of the cache") in caplog.text
        content = secrets.token_bytes(1 << 20) * 48
        (shared_dir / "from-host").write_bytes(content)
        await prepare_guest(vm)
        script = "nproc; cat /proc/meminfo; cp /mnt/from-host /mnt/from-guest; cat /proc/zoneinfo"
        told = await run_in_guest(vm, "/bin/busybox", "sh", "-c", script, share=".")
        processors, _, rest = told.partition("\n")
        assert processors == str(vcpus)
        memory = re.search(r"MemTotal: +(\d+) kB", rest)
        assert memory is not None
        # A whole block of 128 MiB was added to what is less than 256 because the kernel keeps a part.
        assert 256 << 10 < int(memory[1]) < 384 << 10
        assert (shared_dir / "from-guest").read_bytes() == content
        # The new memory is above 4 GiB, the zone "Normal", and there was none before.
        normal = re.search(r"zone +Normal\n +pages free +(\d+)(?:\n.*)*?\n +managed +(\d+)", rest)
        assert normal is not None
        used = int(normal[2]) - int(normal[1])
        assert used > 40 << 8, "the file should have gone through it"
    traces.assert_none()


@COPIES
async def test_a_vm_that_does_not_grow_is_booted_in_its_size(
    factory: Factory, config: VMConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(hotplug, "OST_SUCCESS", 1)  # the guest says 0
    larger = replace(config, memory_mib=config.memory_mib + 100)
    traces = Traces(config.run_dir)
    async with factory.vm(larger, vmid=traces.vmid, netns="", shared_dir=None) as vm:
        assert "cannot be made larger: the guest refuses 128 MiB of memory: status 0" in caplog.text
        assert any(" -m 356M," in command for command in traces.processes().values())
        await vm.agent.check()
    traces.assert_none()


async def test_a_vmm_that_cannot_start_says_nothing_against_the_template(
    templates: Templates, config: VMConfig
) -> None:
    """One pod with a bad network namespace threw away the template of all others."""
    key, _ = identify(config)
    factory = TemplateFactory(templates, config)
    with pytest.raises(HypervisorError, match="/no/such/netns"):
        async with factory.vm(config, vmid="0123456789abcdef", netns="/no/such/netns", shared_dir=None):
            pass
    assert templates.failure(key) is None
    with templates.opened(key) as template:
        assert template is not None


@COPIES
async def test_what_the_host_mounts_in_the_share_does_not_end_with_a_process_that_uses_it(
    factory: Factory, config: VMConfig, shared_dir: Path
) -> None:
    """A container that was killed right after its start now and then never ended.

    The file system of its root was mounted in the container's namespace alone, and ended with it. Linux does
    not wait then for what is being read ahead, comes across it afterwards ("VFS: Busy inodes"), and leaves
    the process as it is: dead, and never to be reaped.
    """
    volume = shared_dir / "volume"
    volume.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", volume], check=True)
    try:
        (volume / "file").write_text("content\n")
        async with factory.vm(config, vmid=secrets.token_hex(8), netns="", shared_dir=shared_dir) as vm:
            await prepare_guest(vm)
            look = ("/bin/busybox", "cat", "/mnt/file", "/srv/1/mountinfo")
            content, *mounted = (await run_in_guest(vm, *look, share="volume")).splitlines()
            assert content == "content"
            place = f" {GUEST_SHARE}/volume "
            assert [line for line in mounted if place in line and " - virtiofs " in line], mounted
            # And it does end with the container, or the host could not take it back.
            mounted = (await run_in_guest(vm, "/bin/busybox", "cat", "/srv/1/mountinfo")).splitlines()
            assert [line for line in mounted if place in line] == []
    finally:
        subprocess.run(["umount", volume], check=True)


@COPIES
async def test_two_copies_of_a_vm_have_nothing_in_common(factory: Factory, config: VMConfig) -> None:
    seen: list[list[str]] = []
    for name in ("one", "two"):
        async with factory.vm(config, vmid=secrets.token_hex(8), netns="", shared_dir=None) as vm:
            await prepare_guest(vm, name, share=False)
            seen.append((await run_in_guest(vm, "/usr/bin/python3.11", "-c", IDENTITIES)).splitlines())
    one, two = seen
    assert (one[4], two[4]) == ("one", "two")
    assert [one[5], two[5]] == ["False", "False"], "what has a machine id must make it its own"
    assert len({*one[:4], *two[:4]}) == 8
    shifts = [(int(a) - int(b)) % 2**32 for a, b in zip(one[6:], two[6:], strict=True)]
    assert len(shifts) == 4
    # With one secret for both, nothing is between them but the time from connection to clock.
    assert not all(min(shift, 2**32 - shift) < SECOND for shift in shifts), seen
