"""What a program sees of the host from inside of a VMM's jail, told by itself."""

import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vc.hypervisor.children import prefix, running
from vc.hypervisor.jail import FIRST_UID, TOP_LEVEL, UIDS, Needs, jail, obstacle, uid_of

ROOT = Path(__file__).parents[3]
VMID = secrets.token_hex(8)  # a user of this run alone: one sees all of one's own processes
SHELL = Needs(program=Path("/usr/bin/sh").resolve(), devices=(Path("/dev/null"), Path("/dev/urandom")))

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


async def said(script: str, needs: Needs = SHELL, netns: str | None = "") -> list[str]:
    """Run a script in a jail and return its lines."""
    with jail(VMID, needs, netns=netns) as made:
        assert made is not None
        async with running([*prefix(jail=made), "sh", "-c", script], name="script") as child:
            await child.wait_dead()
        return child.stderr.lines()


async def test_it_is_a_user_of_its_own_without_groups_and_capabilities() -> None:
    lines = await said("grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs):' /proc/self/status")
    status = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
    uid = str(uid_of(VMID))
    assert status.pop("Uid") == status.pop("Gid") == [uid] * 4
    assert status.pop("Groups") == []
    assert status.pop("NoNewPrivs") == ["1"]
    assert {name: int(value[0], 16) for name, value in status.items()} == dict.fromkeys(status, 0)
    assert len(status) == 5


async def test_of_the_hosts_files_there_are_its_programs_and_what_it_was_given(tmp_path: Path) -> None:
    given = tmp_path / "private" / "kernel"
    given.parent.mkdir(mode=0o700)
    given.write_text("the kernel")
    (given.parent / "beside").write_text("a secret")
    needs = Needs(program=SHELL.program, files=(given,), devices=SHELL.devices)
    script = f"for d in / /dev /etc {given.parent}; do cd $d; echo *; done; cat {given}"
    top = {"dev", "etc", "proc", "usr", given.parts[1], *TOP_LEVEL}
    lines = await said(script, needs)
    assert set(lines.pop(0).split()) == {name for name in top if Path("/", name).exists()}
    assert lines == ["null urandom", "ld.so.cache", "kernel", "the kernel"]


async def test_a_file_that_others_may_not_read_is_given_all_the_same(tmp_path: Path) -> None:
    given = tmp_path / "kernel"
    given.write_bytes(b"x" * 3_000_000)
    given.chmod(0o600)
    needs = Needs(program=SHELL.program, files=(given,))
    assert await said(f"wc -c <{given}", needs) == ["3000000"]


async def test_what_lies_in_the_programs_tree_is_given_even_if_others_may_not_enter(
    tmp_path: Path,
) -> None:
    """Programs outside of /usr bring their directory along, and the guest may lie in it."""
    tree = tmp_path / "kata"
    for name in ("bin/sh", "share/open/kernel", "share/closed/deeper/initrd", "share/closed/image"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    shutil.copy("/usr/bin/sh", tree / "bin" / "sh")
    (tree / "share/closed").chmod(0o700)
    (tree / "share/open/kernel").chmod(0o600)
    (tree / "share/closed/image").chmod(0o600)
    names = ("share/open/kernel", "share/closed/deeper/initrd", "share/closed/image")
    files = [tree / name for name in names]
    needs = Needs(program=tree / "bin" / "sh", files=tuple(files))
    lines = await said(" && echo && ".join(f"cat {file}" for file in files), needs)
    assert lines == list(names)


def test_a_program_that_others_may_not_run_is_told(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "sh"
    program.parent.mkdir()
    shutil.copy("/usr/bin/sh", program)
    program.chmod(0o700)
    assert "others may not run" in obstacle(Needs(program=program))
    assert obstacle(SHELL) == ""


async def test_a_host_that_gives_nothing_to_others_has_the_same_jail(tmp_path: Path) -> None:
    """Symptom: QEMU could not open its devices. Cause: the directories were made by the process's umask."""
    given = tmp_path / "etc" / "kernel"
    before = os.umask(0o077)
    try:
        given.parent.mkdir()
        given.write_text("the kernel\n")
        needs = Needs(program=SHELL.program, files=(given,), devices=SHELL.devices)
        assert await said(f"cat {given} && echo >/dev/null && echo ok", needs) == ["the kernel", "ok"]
    finally:
        assert os.umask(before) == 0o077


async def test_nothing_can_be_written_but_to_a_device(tmp_path: Path) -> None:
    given = tmp_path / "image"
    given.write_text("whole")
    given.chmod(0o666)
    needs = Needs(program=SHELL.program, files=(given,), devices=SHELL.devices)
    script = f"""
    for place in / /dev /etc /proc /usr /usr/bin /usr/local /tmp {tmp_path}; do
        (: >$place/x) 2>/dev/null && echo $place
    done
    (echo broken >{given}) 2>/dev/null && echo {given}
    echo >/dev/null && echo ok
    """
    assert await said(script, needs) == ["ok"]
    assert given.read_text() == "whole"


async def test_it_sees_no_process_but_its_own_and_nothing_of_the_kernel() -> None:
    lines = await said("echo $$; echo /proc/[0-9]*; ls /proc/sys /proc/cmdline 2>&1 | wc -l")
    assert lines[1] == f"/proc/{lines[0]}"
    assert lines[2] == "2"  # two complaints


async def test_its_namespaces_are_nobody_elses() -> None:
    kinds = ("mnt", "net", "ipc", "uts")
    lines = await said("; ".join(f"readlink /proc/self/ns/{kind}" for kind in kinds))
    for kind, line in zip(kinds, lines, strict=True):
        assert line.startswith(f"{kind}:[") and line != str(Path(f"/proc/self/ns/{kind}").readlink())


async def test_a_network_namespace_that_exists_is_joined() -> None:
    mine = str(Path("/proc/self/ns/net").readlink())
    assert await said("readlink /proc/self/ns/net", netns=None) == [mine]
    with subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; read line"], stdin=-1, stdout=-1) as other:
        assert other.stdout is not None and other.stdout.readline()
        path = f"/proc/{other.pid}/ns/net"
        assert await said("readlink /proc/self/ns/net", netns=path) == [str(Path(path).readlink())]
        other.communicate()
    assert str(Path("/proc/self/ns/net").readlink()) == mine


def traces() -> tuple[str, int, str]:
    mounts = Path("/proc/self/mountinfo").read_text()
    return mounts, len(list(Path("/proc/self/fd").iterdir())), str(Path.cwd())


async def test_nothing_of_it_is_left_nor_seen_from_outside() -> None:
    before = traces()
    with jail(VMID, SHELL, netns="") as made:
        assert made is not None
        assert (traces()[0], traces()[2]) == (before[0], before[2])
    assert traces() == before


def test_where_it_cannot_be_made_there_is_a_warning_and_no_jail() -> None:
    script = f"""
import logging
from pathlib import Path
from vc.hypervisor.jail import Needs, jail
logging.basicConfig(format="%(levelname)s %(message)s")
with jail("{VMID}", Needs(program=Path("/usr/bin/sh")), netns="") as made:
    print(made)
"""
    argv = ["setpriv", "--bounding-set=-sys_admin", "--", sys.executable, "-c", script]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
    assert done.stderr.startswith("WARNING ") and "as root" in done.stderr
    assert "unshare: Operation not permitted" in done.stderr and "rootless" in done.stderr


@pytest.fixture
def orphan() -> Iterator[int]:
    """Return the id of a process in a jail whose parent was killed."""
    script = f"""
import subprocess, sys
from pathlib import Path
from vc.hypervisor.children import prefix
from vc.hypervisor.jail import Needs, jail
with jail("{VMID}", Needs(program=Path("/usr/bin/sh")), netns="") as made:
    argv = [*prefix(jail=made), "sh", "-c", "echo $$; read line"]
    subprocess.Popen(argv, stdin=subprocess.PIPE)
    sys.stdin.read()
"""
    argv = [sys.executable, "-c", script]
    with subprocess.Popen(argv, stdin=-1, stdout=-1, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        pidfd = os.pidfd_open(pid)
        assert f"Uid:\t{uid_of(VMID)}" in Path(f"/proc/{pid}/status").read_text()
        parent.kill()
    yield pidfd
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    os.close(pidfd)


def test_it_dies_with_its_parent_although_that_is_another_user(orphan: int) -> None:
    assert select.select([orphan], [], [], 30)[0], "it lives on"


def test_two_vms_are_two_users_of_a_range_that_nobody_has() -> None:
    uids = {uid_of(f"{number:016x}") for number in range(100)}
    assert len(uids) == 100
    assert all(FIRST_UID <= uid < FIRST_UID + UIDS < 2**31 + 1 for uid in uids)
