"""What a pod's guest can reach on the host, looked at from both sides: docs/security.md has the table.

Most tests look at the pod that all tests share. One breaks out of its container first, by the guest kernel's
own means, and then is root of the guest with everything that an attacker has there.
"""

import os
import re
import stat
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.test_e2e_crashes import shim_of, wait_until
from tests.e2e.test_e2e_faults import PRIVILEGED, processes_of_vm, vmid_of
from tests.harness.containerd import TIMEOUT, Containerd
from tests.harness.leaks import shim_socket
from vc.hypervisor.jail import uid_of
from vc.network.scan import interfaces_of

pytestmark = pytest.mark.usefixtures("vm_runtime")

# CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP: it acts for any user of the guest.
VIRTIOFSD_CAPABILITIES = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 27 | 1 << 31
FILTERED = "2"  # SECCOMP_MODE_FILTER: proc(5)
O_ACCMODE = os.O_RDONLY | os.O_WRONLY | os.O_RDWR
SHARE = "/run/kata-containers/shared/containers"


@dataclass(frozen=True)
class Pod:
    """The processes and directories of one on the host."""

    container: str
    vmid: str
    run_dir: Path
    vmm: int
    virtiofsd: int  # the one that serves, not the one that waits for it


def look_at(containerd: Containerd, container: str) -> Pod:
    vmid = vmid_of(containerd, container)
    served = [
        process.pid
        for process in processes_of_vm(containerd, vmid)
        if "virtiofsd" in process.argv and status_of(process.pid)["Seccomp"] == FILTERED
    ]
    assert len(served) == 1 and containerd.runtime.run_dir is not None
    return Pod(container, vmid, containerd.runtime.run_dir, containerd.task_pid(container), served[0])


@pytest.fixture
def pod(containerd: Containerd, shared: str) -> Pod:
    return look_at(containerd, shared)


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def files_of(pid: int) -> dict[str, str]:
    """Return what each descriptor of a process is open on."""
    return {file.name: str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()}


def memory_of(pod: Pod) -> list[Path]:
    """Return the descriptors of the file that is the guest's memory."""
    found = [number for number, target in files_of(pod.vmm).items() if "/memfd:" in target]
    return [Path(f"/proc/{pod.vmm}/fd", number) for number in found]


def namespace(pid: int | str, kind: str) -> str:
    return str(Path(f"/proc/{pid}/ns/{kind}").readlink())


def core_limit(pid: int) -> str:
    [line] = [line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "core file" in line]
    return line.split()[4]


def paths_of_sockets(pid: int) -> list[str]:
    """Return the paths of a process's unix sockets; one that is only connected has none.

    One that another network namespace made, which is the VMM's own channel, is not in this one's list.
    """
    paths: dict[str, str] = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        paths[fields[6]] = fields[7] if len(fields) == 8 else ""
    inodes = [target[8:-1] for target in files_of(pid).values() if target.startswith("socket:[")]
    return [paths.get(inode, "") for inode in inodes]


def walk(directory: Path) -> Iterator[Path]:
    yield directory
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            yield from walk(path)
        else:
            yield path


# On the host


def test_the_files_directories_and_sockets_of_a_pod_are_for_root_alone(
    containerd: Containerd, pod: Pod
) -> None:
    seen = [path for path in walk(pod.run_dir) if not path.is_symlink()]
    # Below `mounts` is what the guest sees, with the modes that containers need, behind a private directory.
    mine = [path for path in seen if not re.search(r"/(mounts|shared)/", str(path))]
    kinds = Counter(stat.S_IFMT(path.lstat().st_mode) for path in mine)
    assert kinds[stat.S_IFSOCK] >= 3 and kinds[stat.S_IFREG] >= 3 and kinds[stat.S_IFDIR] >= 6
    for path in (*mine, shim_socket(containerd, pod.container)):
        found = path.lstat()
        assert (found.st_uid, found.st_mode & 0o077) == (0, 0), path


def test_the_vmm_is_a_user_that_nobody_else_is_and_may_do_nothing(containerd: Containerd, pod: Pod) -> None:
    status = status_of(pod.vmm)
    assert status["Uid"].split() == status["Gid"].split() == [str(uid_of(pod.vmid))] * 4
    assert status["Groups"] == ""
    assert {int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", FILTERED)


def test_the_vmm_sees_no_file_of_the_host_but_programs_and_what_it_boots(pod: Pod) -> None:
    shim = namespace("self", "mnt")
    assert namespace(pod.vmm, "mnt") != shim
    mounts = [line.split() for line in Path(f"/proc/{pod.vmm}/mountinfo").read_text().splitlines()]
    assert all(re.match(r"ro,|rw,.*proc$", f"{fields[5]} {fields[8]}") for fields in mounts), mounts
    points = {fields[4] for fields in mounts}
    boots = {point for point in points if re.search(r"/(vmlinu[xz]|initrd\.img|rootfs\.erofs)$", point)}
    merged = {f"/{name}" for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32")}
    assert points - boots - merged == {"/", "/usr", "/proc", "/etc/ld.so.cache"}
    assert len(boots) == 3


def test_the_vmm_has_no_descriptor_but_those_it_was_meant_to_have(pod: Pod) -> None:
    files = files_of(pod.vmm)
    kinds = Counter(re.sub(r":\[?\d+\]?$", "", target) for target in files.values())
    for harmless in ("anon_inode:[eventfd]", "anon_inode:[eventpoll]", "anon_inode:[signalfd]"):
        kinds.pop(harmless, None)
    assert kinds.pop("/dev/null") == 1  # standard input
    assert kinds.pop("pipe") == 2  # standard output and error, to the shim
    assert kinds.pop("/dev/urandom") == 1
    # The console, QMP's and the agent's listeners and connections, virtiofsd's and the channel back from it.
    assert kinds.pop("socket") <= 7
    image = [number for number, target in files.items() if target.endswith("rootfs.erofs")]
    memory = memory_of(pod)
    assert len({file.stat().st_ino for file in memory}) == 1  # of a restored guest there are two
    assert (len(image), sum(kinds.values())) == (1, 1 + len(memory)), kinds
    info = Path(f"/proc/{pod.vmm}/fdinfo/{image[0]}").read_text()
    match = re.search(r"flags:\s*(\d+)", info)
    assert match is not None and int(match[1], 8) & O_ACCMODE == os.O_RDONLY
    assert set(paths_of_sockets(pod.vmm)) <= {
        "",
        *(f"{pod.run_dir}/vm/{pod.vmid}/{name}.sock" for name in ("qmp", "agent")),
    }


def test_the_network_of_the_vmm_and_of_virtiofsd_is_empty(containerd: Containerd, pod: Pod) -> None:
    for pid in (pod.vmm, pod.virtiofsd):
        assert namespace(pid, "net") != namespace("self", "net")
        assert interfaces_of(pid) == []


def test_the_memory_of_a_guest_is_in_no_core_dump(pod: Pod) -> None:
    # 1 and not 0: a core dump that goes to a program is stopped by that alone (core(5)).
    assert {core_limit(pod.vmm), core_limit(pod.virtiofsd)} == {"1"}


def test_a_guest_has_the_memory_that_was_configured_and_no_more(containerd: Containerd, pod: Pod) -> None:
    total = int(containerd.exec(pod.container, "sh", "-c", "grep MemTotal /proc/meminfo").stdout.split()[1])
    config = Path(containerd.runtime.environ["KATA_CONF_FILE"]).read_text()
    configured = re.search(r"(?m)^default_memory = (\d+)", config)
    memory = memory_of(pod)[0].stat().st_size
    assert configured is not None and memory == int(configured[1]) << 20
    assert total << 10 < memory


def test_virtiofsd_sees_the_shared_directory_of_its_pod_and_nothing_else(
    containerd: Containerd, pod: Pod
) -> None:
    status = status_of(pod.virtiofsd)
    assert int(status["CapEff"], 16) == VIRTIOFSD_CAPABILITIES
    assert (int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, "1")
    shim = shim_of(containerd, pod.container).pid
    for kind in ("mnt", "pid", "net"):
        assert namespace(pod.virtiofsd, kind) not in (namespace("self", kind), namespace(shim, kind))
    share = f"{pod.run_dir}/sbs/{containerd.namespace}--{pod.container}/mounts"
    mounts = [line.split() for line in Path(f"/proc/{pod.virtiofsd}/mountinfo").read_text().splitlines()]
    assert [fields[4] for fields in mounts] == ["/", f"/{pod.container}/rootfs"]
    assert mounts[0][3].endswith(share.removeprefix("/tmp")) and mounts[0][5].startswith("ro,")
    for target in files_of(pod.virtiofsd).values():
        allowed = rf"/({re.escape(pod.container)}(/.*)?)?|/1/task|/dev/null|(socket|pipe|anon_inode):.*"
        assert re.fullmatch(allowed, target), target


def test_a_root_that_is_to_be_read_only_is_so_on_the_host(containerd: Containerd) -> None:
    with containerd.running(flags=["--read-only"]) as container:
        pod = look_at(containerd, container)
        mounts = Path(f"/proc/{pod.virtiofsd}/mountinfo").read_text().splitlines()
        [root] = [fields for fields in map(str.split, mounts) if fields[4] == f"/{container}/rootfs"]
        assert root[5].startswith("ro,")


# From the guest

# What a container sees of the machine's devices: it is what its guest sees.
PCI = "for d in /sys/bus/pci/devices/*; do cat $d/vendor $d/device; done | paste -sd ' \\n' -"
DEVICES = {
    "0x8086 0x29c0": 1,  # q35's host bridge
    "0x8086 0x2918": 1,  # its ISA bridge, which has the serial console, timers and interrupt controllers
    "0x1af4 0x1043": 1,  # virtio-serial: the agent
    "0x1af4 0x1042": 1,  # virtio-blk: the guest's root, read-only
    "0x1af4 0x1044": 1,  # virtio-rng
    "0x1af4 0x105a": 1,  # vhost-user-fs
    "0x1b36 0x000c": 6,  # pcie-root-port: empty places
}


def test_a_guest_has_these_devices_and_no_others(containerd: Containerd, pod: Pod) -> None:
    found = containerd.exec(pod.container, "sh", "-c", PCI).stdout.decode().split("\n")
    assert Counter(filter(None, found)) == DEVICES


PROCESSES = 200


def test_many_processes_in_a_guest_are_none_on_the_host(containerd: Containerd, pod: Pod) -> None:
    before = set(processes_of_vm(containerd, pod.vmid))
    threads = int(status_of(pod.vmm)["Threads"])
    many = f"for i in $(seq {PROCESSES}); do sleep 1000 & done; echo up; read line; kill $(jobs -p)"
    arguments = containerd.exec_arguments(pod.container, "sh", "-c", many)
    with containerd.popen(*arguments, stdin=subprocess.PIPE) as client:
        assert client.stdout is not None and client.stdout.readline() == b"up\n"
        inside = containerd.exec(pod.container, "sh", "-c", "ls -d /proc/[0-9]* | wc -l").stdout
        assert int(inside) > PROCESSES
        assert set(processes_of_vm(containerd, pod.vmid)) == before
        # QEMU has a pool of threads for files, which comes and goes.
        assert int(status_of(pod.vmm)["Threads"]) < threads + PROCESSES // 4
        client.communicate(timeout=TIMEOUT)


# Run by the guest's kernel as its root, in the namespaces of its agent, when a process dumps core. It tries
# to write wherever it should not be able to, also after taking away what is read-only in the guest.
ATTACK = """\
#!{share}/{container}/rootfs/bin/busybox sh
B={share}/{container}/rootfs/bin/busybox
cd {share}
exec >{volume}/log 2>&1
echo "uid $($B id -u) pid1 $($B cat /proc/1/comm)"
for name in *; do echo "sees $name"; done
tries() {{
    for place in "$1" "$1/{container}" "$1/{container}/rootfs" "$1/{constant}"; do
        (echo x >"$place/planted") 2>/dev/null && echo "wrote to $place"
        $B mkdir "$place/dir" 2>/dev/null && echo "made a directory in $place"
        $B ln -s /etc "$place/link" 2>/dev/null && echo "made a link in $place"
    done
    $B mv "$1/{constant}" "$1/moved" 2>/dev/null && echo "moved $1/{constant}"
    $B rm -r "$1/{constant}/file" 2>/dev/null && echo "removed a file from $1/{constant}"
    $B rm -r "$1/{container}/rootfs/bin" 2>/dev/null && echo "removed a directory from $1/{container}"
    (echo x >"$1/{constant}/file") 2>/dev/null && echo "changed a file in $1"
    $B chmod 777 "$1/{constant}/file" 2>/dev/null && echo "changed the mode of a file in $1"
}}
tries {share}
for place in {share} {share}/{container}/rootfs {share}/{constant}; do
    $B mount -o remount,rw $place 2>/dev/null
done
tries {share}
echo x >{volume}/written
$B mv {volume}/log {volume}/done
"""


def test_root_of_the_guest_outside_of_any_container_writes_only_where_the_pod_may(
    containerd: Containerd, shared: str
) -> None:
    volume, constant = containerd.directory / "tmp" / "volume", containerd.directory / "tmp" / "constant"
    for directory in (volume, constant):
        directory.mkdir()
        (directory / "file").write_text("whole")
    flags = ["--privileged", "--read-only"]
    for directory, mode in ((volume, "rw"), (constant, "ro")):
        target = f"/{directory.name}"
        flags += ["--mount", f"type=bind,src={directory},dst={target},options=rbind:{mode}"]
    with containerd.running(flags=flags) as container:
        pod = look_at(containerd, container)
        places = pod.run_dir / "sbs" / f"{containerd.namespace}--{container}" / "mounts"
        names = {name.rpartition("-")[2]: name for name in os.listdir(places) if name != container}  # noqa: PTH208
        script = ATTACK.format(
            share=SHARE, container=container, volume=f"{SHARE}/{names['volume']}", constant=names["constant"]
        )
        (volume / "attack").write_text(script)
        (volume / "attack").chmod(0o755)
        escape = f"echo '|{SHARE}/{names['volume']}/attack' >/proc/sys/kernel/core_pattern"
        crash = f"{PRIVILEGED}{escape} && sh -c 'kill -SEGV $$'"
        result = containerd.exec(container, "sh", "-c", crash)
        wait_until(lambda: (volume / "done").exists())
        said = (volume / "done").read_text().splitlines()
        assert said[0].startswith("uid 0 pid1 "), (said, result)
        seen = {line.removeprefix("sees ") for line in said[1:] if line.startswith("sees ")}
        assert seen == {container, names["volume"], names["constant"]}  # and nothing of the pod beside it
        assert len(said) == 1 + len(seen), said
        assert (volume / "written").read_text() == "x\n"
        assert containerd.exec(container, "cat", "/constant/file").stdout == b"whole"
    assert [path.name for path in constant.iterdir()] == ["file"]
    assert ((constant / "file").read_text(), (constant / "file").stat().st_mode & 0o777) == ("whole", 0o644)
    for directory in (volume, constant):
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
