"""What nobody owns is found and can be removed; what somebody owns is never touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.vc import planted
from tests.vc.planted import SANDBOX, VMID, Host, vmm_words
from vc import leaks
from vc.cleanup import cleanup_sandbox, remove_vm
from vc.config import FactoryConfig
from vc.factory.templates import Templates
from vc.leaks import Kind, Leak
from vc.persist import store
from vc.persist.schema import SandboxRecord
from vc.pids import start_ticks
from vc.storage.mounts import bind, mounted_below
from vc.unixsock import listen

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with ExitStack() as stack:
        yield Host(tmp_path, stack)


@pytest.mark.parametrize(
    "plant",
    [
        planted.plant_process_of_a_record,
        planted.plant_process_of_a_vm_directory,
        planted.plant_process_whose_directory_is_gone,
        pytest.param(planted.plant_mount_of_a_sandbox, marks=needs_root),
        pytest.param(planted.plant_mount_of_a_vm, marks=needs_root),
        planted.plant_socket_without_a_directory,
        planted.plant_socket_of_a_shim,
        planted.plant_file,
        planted.plant_sandbox,
        planted.plant_sandbox_without_a_record,
        planted.plant_vm,
        planted.plant_half_a_template,
        planted.plant_process_of_a_template,
        planted.plant_socket_of_a_cache,
        planted.plant_socket_at_which_a_cache_handed_over,
    ],
)
def test_what_nobody_owns_is_found_and_removed(host: Host, plant: Callable[[Host], tuple[Kind, str]]) -> None:
    kind, name = plant(host)
    found = host.find()
    assert (kind, name) in {(leak.kind, leak.name) for leak in found}
    assert [(leak.kind, reason) for leak, reason in leaks.remove(found) if reason] == []
    assert host.find() == []
    assert mounted_below(host.run_dir) == []
    if kind is Kind.PROCESS:
        assert start_ticks(int(name)) == 0 or Path(f"/proc/{name}/cmdline").read_bytes() == b""
    else:
        assert not os.path.lexists(name)


@needs_root
def test_a_live_sandbox_keeps_everything(host: Host) -> None:
    directory = host.sandbox()
    vm = host.vm()
    host.mount(directory)
    host.mount(vm)
    host.process(*vmm_words())
    host.process("-o", f"source={vm}/shared/.,cache=auto")
    host.socket(host.shim_socket("c1"))
    lock = host.lock(directory)
    assert host.find() == []
    lock.release()
    kinds = [leak.kind for leak in host.find()]
    assert kinds.count(Kind.PROCESS) == kinds.count(Kind.MOUNT) == kinds.count(Kind.DIRECTORY) == 2
    assert kinds.count(Kind.SOCKET) == 1


def test_a_dead_sandbox_beside_a_live_one(host: Host) -> None:
    host.lock(host.sandbox("default--live", "11" * 8))
    host.vm("11" * 8)
    live = host.process(*vmm_words("11" * 8))
    dead = host.process(*vmm_words())
    expected = {(Kind.PROCESS, str(dead.pid)), (Kind.DIRECTORY, str(host.sandbox()))}
    assert host.found() == expected
    assert all(reason == "" for _, reason in leaks.remove(host.find()))
    assert dead.wait() == -9
    assert live.poll() is None


def test_a_vm_without_a_sandbox_lives_by_its_own_lock(host: Host) -> None:
    lock = host.lock(host.vm())
    host.process(*vmm_words())
    assert host.find() == []
    lock.release()
    assert {leak.kind for leak in host.find()} == {Kind.PROCESS, Kind.DIRECTORY}


def test_a_process_of_another_run_directory_is_not_ours(host: Host, tmp_path: Path) -> None:
    host.sandbox()
    host.process(*vmm_words("22" * 8))
    host.process("-o", f"source={tmp_path}/other/vm/{'22' * 8}/shared/.,cache=auto")
    assert {leak.kind for leak in host.find()} == {Kind.DIRECTORY}


def test_what_is_being_made_has_no_lock_yet_and_is_no_leak(host: Host) -> None:
    host.layout.sandbox(SANDBOX).mkdir(parents=True)
    host.layout.vm(VMID).mkdir(parents=True)
    assert host.find() == []


def test_a_socket_on_which_somebody_listens_is_left_alone(host: Host) -> None:
    host.layout.vms.mkdir(parents=True)
    host.stack.enter_context(listen(host.layout.vms / "alive.sock"))
    host.sandbox()
    path = host.shim_socket("c1")
    host.stack.enter_context(listen(path))
    assert {leak.kind for leak in host.find()} == {Kind.DIRECTORY}


def test_the_sockets_of_other_shims_are_not_ours(host: Host) -> None:
    host.sandbox()
    host.socket(host.shim_socket("of-runc"))
    assert {leak.kind for leak in host.find()} == {Kind.DIRECTORY}


def test_an_owner_that_comes_between_finding_and_removing_keeps_its_things(host: Host) -> None:
    directory = host.sandbox()
    found = host.find()
    host.lock(directory)
    [(_, reason)] = list(leaks.remove(found))
    assert "owner" in reason
    assert (directory / store.RECORD).exists()


def test_an_owner_that_comes_while_we_look_keeps_its_process(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that is renamed when a VM changes its owner is for a moment nobody's."""
    directory = host.vm()
    process = host.process(*vmm_words())

    def come(owners: leaks.Owners) -> Iterator[Leak]:
        host.lock(directory)
        yield from ()

    assert (Kind.PROCESS, str(process.pid)) in host.found()
    monkeypatch.setattr(leaks, "FINDERS", (come, *leaks.FINDERS))
    assert (Kind.PROCESS, str(process.pid)) not in host.found()


def test_a_listener_that_comes_between_keeps_its_socket(host: Host) -> None:
    _, name = planted.plant_socket_without_a_directory(host)
    found = host.find()
    Path(name).unlink()
    host.stack.enter_context(listen(Path(name)))
    [(_, reason)] = list(leaks.remove(found))
    assert "listens" in reason
    assert Path(name).exists()


def test_another_process_of_the_same_id_is_not_killed(host: Host) -> None:
    process = host.process(*vmm_words())
    stale = Leak(Kind.PROCESS, str(process.pid), "qemu", started=start_ticks(process.pid) - 1, vmid=VMID)
    assert list(leaks.remove([stale])) == [(stale, "")]
    assert process.poll() is None


def test_what_went_by_itself_counts_as_removed(host: Host) -> None:
    process = host.process(*vmm_words())
    host.sandbox()
    host.vm()
    planted.plant_file(host)
    found = host.find()
    assert len(found) == 4
    process.kill()
    process.wait()
    for leak in found:
        if leak.kind is Kind.DIRECTORY:
            subprocess.run(["rm", "-r", leak.name], check=True)
        elif leak.kind is Kind.FILE:
            Path(leak.name).unlink()
    assert [reason for _, reason in leaks.remove(found)] == [""] * 4


@needs_root
def test_files_of_others_under_a_mount_survive(host: Host, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep")
    directory = host.sandbox()
    target = directory / "mounts"
    target.mkdir()
    bind(precious, target)
    bind(precious, target)  # twice, one over the other
    host.aged(directory)
    found = host.find()
    assert [leak.kind for leak in found].count(Kind.MOUNT) == 2
    assert all(reason == "" for _, reason in leaks.remove(found))
    assert not directory.exists()
    assert (precious / "file").read_text() == "keep"


@needs_root
def test_a_run_directory_that_is_a_mount_point_is_no_leak(host: Host) -> None:
    host.layout.sandboxes.mkdir(parents=True)
    bind(host.layout.sandboxes, host.layout.sandboxes)
    bind(host.run_dir, host.run_dir)
    assert host.find() == []


def test_nothing_is_left_where_nothing_ever_was(host: Host) -> None:
    assert host.find() == []


def test_templates_are_no_leak(host: Host) -> None:
    """They are kept among the VMs, as Kata does, and belong to no process."""
    directory = host.layout.vms / FactoryConfig().template_path.name
    (directory / "key").mkdir(parents=True)
    host.aged(directory)
    assert host.found() == set()


def test_a_template_that_is_being_made_is_nobody_elses(host: Host) -> None:
    waste = host.half_a_template()
    found = host.find()
    assert [leak.kind for leak in found] == [Kind.TEMPLATE]
    with Templates(host.templates).locked(wait=False) as ours:  # takes the waste away
        assert ours
        waste.mkdir()
        host.aged(waste)
        host.aged(host.templates)
        process = host.process(*vmm_words())
        assert host.find() == []
        [(_, reason)] = list(leaks.remove(found))
        assert "being made" in reason
    assert waste.exists() and process.poll() is None


def test_what_is_made_anew_between_finding_and_removing_stays(host: Host) -> None:
    directory = host.sandbox()
    found = host.find()
    os.utime(directory)
    [(_, reason)] = list(leaks.remove(found))
    assert "just now" in reason
    assert (directory / store.RECORD).exists()


def test_sandboxes_that_come_and_go_lose_nothing_to_a_fixer_beside_them(host: Host) -> None:
    """A fixer runs all the time, in a process of its own, as `kata-runtime leaks --fix` does."""
    script = f"""
import sys, vc.leaks as leaks
from pathlib import Path
leaks.YOUNG = 0.5
print(flush=True)
while True:
    for leak, reason in leaks.remove(leaks.find(Path({str(host.run_dir)!r}))):
        print(leak.name, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT) as fixer:
        assert fixer.stdout is not None and fixer.stdout.readline()
        try:
            for number in range(200):
                # Each third one is called as one before that was left by its owner.
                name = f"default--{number % 3}"
                while host.layout.sandbox(name).exists():  # the fixer may be removing it as well
                    cleanup_sandbox(name, host.run_dir)
                lock = store.claim(host.layout, name)
                record = SandboxRecord(name, VMID, 1, 2, "/x.toml", 3.0)
                store.save(host.layout, record)
                host.aged(host.layout.sandbox(name))
                assert store.load(host.layout, name) == record
                if number % 2:
                    store.forget(host.layout, name)
                lock.release()
            assert fixer.poll() is None
        finally:
            fixer.kill()


TAP = """
import fcntl, os, struct, sys
from pathlib import Path
from vc import leaks
from vc.network import taps

def add(name, alias):
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, taps.TUNSETIFF, struct.pack(taps.IFREQ, name.encode(), taps.IFF_TAP | 0x5000))
    fcntl.ioctl(tun, taps.TUNSETPERSIST, 1)
    Path("/sys/class/net", name, "ifalias").write_text(alias)
    return tun

run_dir = Path(sys.argv[1])
vms = run_dir / "vm"
os.close(add("dead", str(vms / "00aa")))
os.close(add("live", str(vms / "11aa")))
os.close(add("foreign", "/elsewhere/vm/00aa"))
os.close(add("unmarked", ""))
busy = add("busy", str(vms / "22aa"))
for leak in leaks.find(run_dir):
    print(leak)
for leak, reason in leaks.remove(leaks.find(run_dir)):
    print(leak.name, reason)
print(*sorted(os.listdir("/sys/class/net")))
"""


@needs_root
def test_a_tap_of_a_vm_that_is_gone_is_found_and_removed(host: Host) -> None:
    """In a network namespace of its own, with a view of it in /sys."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("/dev/net/tun is missing: the kernel has no taps")
    host.lock(host.vm("11aa"))
    (host.layout.vm("11aa") / "qmp.sock").unlink()
    shell = 'mount -t sysfs sysfs /sys && exec "$@"'
    argv = ["unshare", "--net", "--mount", "sh", "-c", shell, "sh", sys.executable, "-c", TAP, host.run_dir]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    found, again, *removed, left = done.stdout.splitlines()
    assert found == "tap busy: of VM 22aa, which is gone"
    assert again == "tap dead: of VM 00aa, which is gone"
    assert removed == ["busy [Errno 16] Device or resource busy", "dead "]
    assert left == "busy foreign live lo unmarked"


def test_a_vm_that_changed_its_owner_is_known_by_the_name_that_its_vmm_has(host: Host) -> None:
    waited_as = "a1" * 8
    host.sandbox()
    directory = host.vm()
    (directory / "name").write_text(waited_as)
    host.aged(directory)
    vmm = host.process(*vmm_words(waited_as))
    assert (Kind.PROCESS, str(vmm.pid)) in host.found()
    host.lock(directory)
    assert (Kind.PROCESS, str(vmm.pid)) not in host.found()
    remove_vm(host.layout, VMID)
    assert vmm.wait() == -signal.SIGKILL
    assert not directory.exists()
