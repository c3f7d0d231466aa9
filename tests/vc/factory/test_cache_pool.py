"""VMs that wait and change hands, with real processes and descriptors; only the guest in them is missing."""

import logging
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio

from protos.kata import cache_pb2
from vc.errors import AlreadyExists, HypervisorError, VCError
from vc.factory import cacheserver
from vc.factory.cache import CacheFactory
from vc.factory.cachedoor import ask as call
from vc.factory.cachedoor import quit_cache, status_of
from vc.factory.cacheserver import Pool, hand_over, listen_at, run_cache
from vc.factory.handover import Wanted, cache_key, handover_path, parse_wanted_untrusted, take
from vc.hypervisor.base import VMConfig
from vc.hypervisor.children import prefix
from vc.hypervisor.lease import leased
from vc.hypervisor.parked import Parked, duplicate, parse_parked_untrusted, with_descriptors

LIMIT = 20  # seconds; what hangs is to fail and not to hang the tests
KEY = "the-key"


class Guestless:
    """A VM whose VMM is `sleep`: it can be parked, and that is all."""

    agent = details = None

    def __init__(self, vmid: str, child, lock: int) -> None:
        self._vmid, self._child, self._lock = vmid, child, lock

    async def park(self) -> Parked:
        child = self._child
        null = os.open(os.devnull, os.O_RDONLY)
        copies = duplicate(child.lease, child.pidfd, child.stderr_fd, null, self._lock)
        os.close(null)
        child.parked = True
        return with_descriptors(copies, vmid=self._vmid, pid=child.pid, cid=None, details=b"")


class Sleepers:
    """A factory of such VMs."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.failures = 0  # of the next ones

    @asynccontextmanager
    async def vm(self, config: VMConfig, *, vmid: str, netns, shared_dir) -> AsyncIterator[Guestless]:
        assert (netns, shared_dir) == ("", None)
        if self.failures:
            self.failures -= 1
            raise HypervisorError("this one fails")
        directory = config.run_dir / "vm" / vmid
        directory.mkdir(parents=True)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT)
        vm = None
        try:
            argv = [*prefix(capabilities=True), "sleep", "1000"]
            async with leased(argv, name="sleep", vm_dir=directory) as child:
                self.pids.append(child.pid)
                yield (vm := Guestless(vmid, child, lock))
        finally:
            if vm is None or not child.parked:
                shutil.rmtree(directory, ignore_errors=True)  # as every VM's directory ends with it
            os.close(lock)


@pytest.fixture
def config(tmp_path: Path) -> VMConfig:
    return VMConfig(qemu=Path("/qemu"), kernel=Path("/kernel"), memory_mib=64, run_dir=tmp_path / "run")


@pytest.fixture
def endpoint(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "cache.sock"


async def no_guest(agent: None, details: None) -> None:
    """There is nothing to warm up."""
    assert agent is details is None


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cacheserver, "REFILL_DELAY", 0.0)
    monkeypatch.setattr(cacheserver, "warm_up", no_guest)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def until(condition) -> None:
    with trio.fail_after(LIMIT):
        while not condition():
            await trio.sleep(0.01)  # nothing tells


@asynccontextmanager
async def serving(
    config: VMConfig, endpoint: Path, sleepers: Sleepers, size: int, *, key: str = KEY
) -> AsyncIterator[Pool]:
    """Keep `size` VMs and hand them over, as long as the block lasts; starts when all are ready."""
    pool = Pool(sleepers, config, size)
    with ExitStack() as stack:
        listener = listen_at(stack, endpoint)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hand_over, listener, pool, key)
            await nursery.start(pool.fill)
            await until(lambda: len(pool.offers()) == size)
            yield pool
            nursery.cancel_scope.cancel()


async def test_each_taker_gets_a_vm_of_its_own_and_it_is_replaced(config: VMConfig, endpoint: Path) -> None:
    descriptors = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    sleepers = Sleepers()
    taken: list[Parked] = []

    async def take_one() -> None:
        taken.append(await take(endpoint, Wanted(key=KEY)))

    async with serving(config, endpoint, sleepers, 3) as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(take_one)
        assert len({one.vmid for one in taken}) == 3
        assert {one.pid for one in taken} == set(sleepers.pids[:3])
        await until(lambda: len(pool.offers()) == 3)
        assert not {offer.vmid for offer in pool.offers()} & {one.vmid for one in taken}
    assert all(alive(one.pid) for one in taken), "they have another owner"
    assert not any(alive(pid) for pid in sleepers.pids[3:]), "nobody has them, and nobody keeps them"
    assert {path.name for path in (config.run_dir / "vm").iterdir()} == {one.vmid for one in taken}
    for one in taken:
        one.close()
    await until(lambda: not any(alive(pid) for pid in sleepers.pids))
    await until(lambda: not list((config.run_dir / "vm").iterdir()))
    assert list(endpoint.parent.iterdir()) == []
    assert set(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


async def test_an_empty_cache_and_one_of_another_configuration_say_so(
    config: VMConfig, endpoint: Path
) -> None:
    sleepers = Sleepers()
    with pytest.raises(HypervisorError, match="no cache runs at"):
        await take(endpoint, Wanted(key=KEY))
    async with serving(config, endpoint, sleepers, 1):
        with pytest.raises(HypervisorError, match="another configuration"):
            await take(endpoint, Wanted(key="another"))
        with pytest.raises(HypervisorError, match="no such VM"):
            await take(endpoint, Wanted(vmid="abc"))
        sleepers.failures = 1  # it is not replaced at once
        (await take(endpoint, Wanted(key=KEY))).close()
        with pytest.raises(HypervisorError, match="none ready"):
            await take(endpoint, Wanted(key=KEY))


async def test_never_more_than_the_number_exist(config: VMConfig, endpoint: Path) -> None:
    sleepers = Sleepers()
    async with serving(config, endpoint, sleepers, 2) as pool:
        offer = pool.promise()
        assert offer is not None
        await trio.testing.wait_all_tasks_blocked()
        assert len(sleepers.pids) == 2, "one that is promised is not given away yet"
        parked = await take(endpoint, Wanted(vmid=offer.vmid))
        assert parked.pid == offer.pid
        await until(lambda: len(pool.offers()) == 2)
        assert len(sleepers.pids) == 3
        parked.close()
        with pytest.raises(HypervisorError, match="no such VM"):
            await take(endpoint, Wanted(vmid=offer.vmid))


async def test_a_vm_that_is_promised_and_not_fetched_is_ended_and_replaced(
    config: VMConfig, endpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cacheserver, "PROMISE", 0.05)
    sleepers = Sleepers()
    async with serving(config, endpoint, sleepers, 1) as pool:
        offer = pool.promise()
        assert offer is not None
        await until(lambda: not alive(offer.pid))
        await until(lambda: len(sleepers.pids) == 2)
        with pytest.raises(HypervisorError, match="no such VM"):
            await take(endpoint, Wanted(vmid=offer.vmid))


async def test_a_vm_that_dies_while_it_waits_is_replaced(config: VMConfig, endpoint: Path) -> None:
    sleepers = Sleepers()
    async with serving(config, endpoint, sleepers, 1) as pool:
        [dead] = pool.offers()
        os.kill(dead.pid, signal.SIGKILL)
        await until(lambda: [offer.pid for offer in pool.offers()] == sleepers.pids[1:] != [])
        assert [path.name for path in (config.run_dir / "vm").iterdir()] == [pool.offers()[0].vmid]


async def test_a_taker_that_goes_before_it_reads_costs_the_vm_and_no_more(
    config: VMConfig, endpoint: Path
) -> None:
    sleepers = Sleepers()
    async with serving(config, endpoint, sleepers, 1) as pool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as impatient:
            impatient.connect(str(handover_path(endpoint)))
            impatient.send(b'{"key": "the-key"}')
            await trio.lowlevel.wait_readable(impatient)
        await until(lambda: not alive(sleepers.pids[0]))
        await until(lambda: [offer.pid for offer in pool.offers()] == sleepers.pids[1:] != [])


async def test_a_taker_that_goes_before_it_is_answered_costs_nothing(
    config: VMConfig, endpoint: Path
) -> None:
    sleepers = Sleepers()
    async with serving(config, endpoint, sleepers, 1) as pool:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.close()
        with ours, pytest.raises(OSError, match="Broken pipe"):
            pool.give(ours)
        (await take(endpoint, Wanted(key=KEY))).close()
        assert len(sleepers.pids) >= 1


@pytest.mark.parametrize("request_", [b"", b"nonsense", b"[]", b'{"key": 1}', b'{"a": "b"}', b"[" * 500])
async def test_nonsense_is_no_request(config: VMConfig, endpoint: Path, request_: bytes) -> None:
    assert parse_wanted_untrusted(request_) is None


async def test_what_is_handed_over_and_is_no_vm_is_refused_and_closed(config: VMConfig) -> None:
    vm = b'{"vmid": "abc", "pid": 1, "cid": null, "details": ""}'
    for data, count in [
        (b"nonsense", 5),
        (vm, 4),
        (vm.replace(b"abc", b"../x"), 5),
        (vm.replace(b"1", b"0"), 5),
    ]:
        descriptors = [os.dup(0) for _ in range(count)]
        with pytest.raises(HypervisorError, match="is no VM"):
            parse_parked_untrusted(data, descriptors)
        for descriptor in descriptors:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)


async def test_a_server_that_dies_while_it_hands_over_is_told(endpoint: Path) -> None:
    with ExitStack() as stack:
        listener = listen_at(stack, endpoint)

        async def die() -> None:
            connection, _ = await trio.socket.from_stdlib_socket(listener).accept()
            with connection:
                await connection.recv(100)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(die)
            with pytest.raises(HypervisorError, match="the cache died while it"):
                await take(endpoint, Wanted(key=KEY))


class Next:
    """The factory that is asked if the cache gives none."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    @asynccontextmanager
    async def vm(self, config: VMConfig, *, vmid: str, netns, shared_dir) -> AsyncIterator[str]:
        self.asked.append(vmid)
        yield "from the next one"


async def test_a_pod_whose_cache_gives_no_vm_gets_one_from_the_next_factory_and_the_log_says_why(
    config: VMConfig, endpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name in ("qemu", "kernel"):
        (tmp_path / name).touch()
    config = replace(config, qemu=tmp_path / "qemu", kernel=tmp_path / "kernel", accelerator="tcg")
    following = Next()
    factory = CacheFactory(endpoint, config, following)

    async def ask(why: str) -> None:
        caplog.clear()
        async with factory.vm(config, vmid="abc", netns="", shared_dir=None) as vm:
            assert vm == "from the next one"
        assert why in caplog.text

    await ask("no VM from the cache: no cache runs at")
    async with serving(config, endpoint, Sleepers(), 1, key="another"):
        await ask("no VM from the cache: the cache says that it keeps VMs of another configuration")
    async with serving(config, endpoint, Sleepers(), 1, key=cache_key(config)) as pool:
        pool.promise()
        await ask("no VM from the cache: the cache says that it has none ready")
    sleepers = Sleepers()
    async with serving(config, endpoint, sleepers, 1, key=cache_key(config)):
        # What is handed over has no monitor and no agent.
        await ask("from the cache is not used: ")
        await until(lambda: not alive(sleepers.pids[0]))
    assert following.asked == ["abc"] * 4
    await until(lambda: not list((config.run_dir / "vm").iterdir()))  # keepers remove what was not ours


def test_a_vm_fits_only_the_same_configuration(config: VMConfig, tmp_path: Path) -> None:
    for name in ("qemu", "kernel"):
        (tmp_path / name).touch()
    config = replace(config, qemu=tmp_path / "qemu", kernel=tmp_path / "kernel", accelerator="tcg")
    assert cache_key(config) == cache_key(replace(config, dial_timeout=7))
    for change in (
        {"memory_mib": 128},
        {"run_dir": tmp_path},
        {"rootless": False},
        {"kernel_params": ("x",)},
    ):
        assert cache_key(replace(config, **change)) != cache_key(config)


async def test_the_grpc_service_tells_promises_and_ends(config: VMConfig, endpoint: Path) -> None:
    sleepers = Sleepers()
    pool = Pool(sleepers, config, 2)
    ready = trio.Event()
    thread = trio.to_thread.run_sync
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_cache, pool, KEY, endpoint, on_ready=ready.set))
        with trio.fail_after(LIMIT):
            await ready.wait()
        await until(lambda: len(pool.offers()) == 2)
        assert endpoint.stat().st_mode & 0o777 == 0o600
        assert handover_path(endpoint).stat().st_mode & 0o777 == 0o600
        assert endpoint.parent.stat().st_mode & 0o777 == 0o700
        with pytest.raises(AlreadyExists, match=r"already exist\.  Please stop running VMCache server"):
            await run_cache(pool, KEY, endpoint, on_ready=ready.set)
        said = await thread(call, endpoint, "Config", cache_pb2.GrpcVMConfig)
        assert said.Data == KEY.encode()
        status = await thread(status_of, endpoint)
        assert status.pid == os.getpid()
        assert [(vm.pid, vm.cpu, vm.memory) for vm in status.vmstatus] == [
            (pid, config.vcpus, 64) for pid in sleepers.pids
        ]
        given = [await thread(call, endpoint, "GetBaseVM", cache_pb2.GrpcVM) for _ in range(2)]
        assert given[0].id != given[1].id
        with pytest.raises(VCError, match="no VM is ready"):
            await thread(call, endpoint, "GetBaseVM", cache_pb2.GrpcVM)
        fetched = await take(endpoint, Wanted(vmid=given[0].id))
        await thread(quit_cache, endpoint)
    assert alive(fetched.pid)
    fetched.close()
    await until(lambda: not any(alive(pid) for pid in sleepers.pids))
    assert list(endpoint.parent.iterdir()) == []


async def test_a_first_vm_that_cannot_be_made_is_the_servers_end(config: VMConfig, endpoint: Path) -> None:
    sleepers = Sleepers()
    sleepers.failures = 1
    with pytest.raises(HypervisorError, match="this one fails"):
        await run_cache(Pool(sleepers, config, 1), KEY, endpoint, on_ready=lambda: None)
    assert list(endpoint.parent.iterdir()) == []
