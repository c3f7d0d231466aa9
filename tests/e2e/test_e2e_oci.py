"""What config.json asks for is there in the container.

One container of each runtime tells everything about itself for one spec, and what they tell is compared: runc
says what the words of a spec mean. Where the two differ, DIFFERENCES lists the lines and argues them.

Nothing that a probe does may change the kernel below it: for runc, that is the host's.
"""

import json
import re
import stat
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import NoLeaks
from tests.harness.containerd import Containerd, Result
from tests.harness.events import Recorder
from tests.harness.image import unpack_image
from tests.harness.runtimes import Runtime, runc

MIB = 1 << 20

# Commands by name, each of which prints lines that mean the same on every runtime.
PROBES: Mapping[str, str] = {
    "identity": "id; umask; pwd",
    "score": "cat /proc/self/oom_score_adj",
    "status": r"sed -n 's/^\(Cap.*\|Seccomp\|NoNewPrivs\|Groups\):[[:space:]]*/\1 /p' /proc/self/status",
    "environment": "env | sort",
    "rlimits": "sed '1d; s/  */ /g' /proc/self/limits",
    "hostname": "hostname",
    "sysctls": "cd /proc/sys; grep . kernel/msgmax fs/mqueue/msg_max net/ipv4/ip_forward net/core/somaxconn",
    "namespaces": "ls /sys/class/net /proc/self/ns",
    "processes": "cat /proc/1/comm; echo $$ $PPID",
    "devices": "cd /dev; stat -c '%n %F %t:%T %a %u %g' [a-z]* net/*; echo x >my-null; cat null tty",
    "masked": "for p in /proc/acpi /proc/kcore /proc/keys /proc/timer_list /sys/firmware /masked /secret; do "
    "echo $p $(ls -A $p 2>&1 | wc -l) $(head -c 9 $p 2>/dev/null | wc -c); done",
    "read-only": "for p in / /home /sys /ro; do touch $p/x; rm -f $p/x; done; echo x >/file; "
    "for p in /proc/sys /proc/irq /proc/bus /ro/sub; do [ -w $p ] && echo $p is writable; done",
    "volumes": "cat /file; ls -d /*/sub/nested; cp /bin/true /rw; /rw/true; stat -c %u:%g:%a /rw/true",
    "seccomp": "cd /tmp; rm -rf *; mkdir denied; mkfifo fifo; touch made; unshare -m true",
    "powers": "cd /tmp; touch mine; chown 7:7 mine; ip link set lo down; chroot / true; rm -f disk; "
    "mknod disk b 8 0; mount -t tmpfs t /mnt",
    "memory": "cat /sys/fs/cgroup/memory.max || cat /sys/fs/cgroup/memory/memory.limit_in_bytes",
    "swap": "cat /sys/fs/cgroup/memory.swap.max",
    "pids": "cat /sys/fs/cgroup/pids.max || cat /sys/fs/cgroup/pids/pids.max",
    "cpu": "cd /sys/fs/cgroup; cat cpu.max || echo $(cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us)",
    "mounts": "cat /proc/self/mountinfo",
    "forks": "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do sleep 1 & done",  # the last one
}
SCRIPT = "".join(f"echo '@@ {name}'; ({command}) 2>&1\n" for name, command in PROBES.items())

Told = Mapping[str, list[str]]


@dataclass(frozen=True, slots=True)
class Difference:
    """Lines that one of the runtimes has alone, as regular expressions, and why that is right."""

    probe: str
    why: str
    ours: str = r"(?!)"
    theirs: str = r"(?!)"

    def explains(self, probe: str, line: str, *, ours: bool) -> bool:
        return probe == self.probe and re.fullmatch(self.ours if ours else self.theirs, line) is not None


NO_FILE = "cat: can't open .*: No such file or directory"
DIFFERENCES = [
    Difference("score", "runc inherits its shim's score where the spec has none", "0", r"-?\d+"),
    Difference(
        "hostname", "without a name in the spec, the container has its kernel's", "localhost", r"[\w.-]+"
    ),
    Difference(
        "sysctls",
        "without a word in the spec, a new network namespace has what its kernel was told",
        "net/ipv4/ip_forward:0",
        "net/ipv4/ip_forward:1",
    ),
    Difference(
        "rlimits",
        "what the spec does not name comes from the kernel, and goes by the size of its memory",
        r"Max (processes|pending signals) \d+ \d+ \w+ ?",
        r"Max (processes|pending signals) \d+ \d+ \w+ ?",
    ),
    Difference(
        "devices", "crun links to /proc/kcore if the kernel has it", ours="core symbolic link 0:0 777 0 0"
    ),
    Difference(
        "masked",
        "one kernel has these and the other may not; what is masked has one entry, or none, and no bytes",
        r"/proc/(acpi|kcore|keys) [01] 0",
        r"/proc/(acpi|kcore|keys) [01] \d",
    ),
    Difference(
        "read-only", "what is below a read-only bind is read-only as well", theirs="/ro/sub is writable"
    ),
    Difference("swap", "a host with control groups of version 1 has no such file", r"\d+|max", NO_FILE),
    Difference("memory", "nor this one", theirs=NO_FILE),
    Difference("pids", "nor this one", theirs=NO_FILE),
    Difference("cpu", "nor this one", theirs=NO_FILE),
    Difference(
        "mounts",
        "crun does not repeat the flags of /proc on a read-only path below it",
        r"/proc/(bus|fs|irq|sys|sysrq-trigger) ro,relatime proc",
        r"/proc/(asound|bus|fs|irq|sys|sysrq-trigger) ro,nosuid,nodev,noexec,relatime proc",
    ),
    Difference(
        "mounts",
        "a masked file is the runtime's /dev/null with crun, the container's own with runc",
        r"/(proc/\w+|secret) ro,relatime devtmpfs",
        r"/(proc/\w+|secret) rw,nosuid tmpfs mode=755 size=65536k",
    ),
    Difference(
        "mounts",
        "an empty directory over a masked one: crun gives it a size",
        r"/(proc/\w+|sys/firmware|masked) ro,relatime tmpfs size=0k",
        r"/(proc/\w+|sys/firmware|masked) ro,relatime tmpfs",
    ),
    Difference(
        "mounts",
        "what is mounted in a volume comes to the guest with the volume, as a file system of the host",
        r"/(ro|rw)/sub (ro|rw,nosuid,noexec),relatime of-host",
        r"/(ro|rw)/sub rw,relatime tmpfs",
    ),
    Difference(
        "mounts",
        "the guest has control groups of version 2",
        "/sys/fs/cgroup ro,nosuid,relatime cgroup2",
        r"/sys/fs/cgroup(/[\w,]+)? .*",
    ),
]


def normal_mount(line: str) -> str:
    """A line of mountinfo: where, with which flags, what; a tmpfs or devpts with its options."""
    left, _, right = line.partition(" - ")
    point, flags = left.split()[4:6]
    kind, _source, options = right.split(maxsplit=2)
    kind = "of-host" if kind in ("virtiofs", "ext4", "xfs", "btrfs", "overlay") else kind
    kept = [
        option
        for option in sorted(options.split(","))
        if kind in ("tmpfs", "devpts")
        and option.partition("=")[0] in ("size", "mode", "uid", "gid", "ptmxmode")
    ]
    return " ".join([point, flags, kind, *kept])


def taken_apart(output: bytes) -> Told:
    told: dict[str, list[str]] = {}
    for line in output.decode().splitlines():
        if line.startswith("@@ "):
            told[line.removeprefix("@@ ")] = lines = []
        else:
            lines.append(line)
    told["mounts"] = [normal_mount(line) for line in told["mounts"]]
    return told


@dataclass(frozen=True, slots=True)
class Both:
    """What the same spec is on the runtime that is tested, and on runc."""

    ours: Told
    theirs: Told


class Specs:
    """Runs containers from specs, on a root file system and volumes of the host."""

    def __init__(self, containerd: Containerd, directory: Path) -> None:
        self.containerd = containerd
        self.directory = directory
        self.root = directory / "rootfs"
        unpack_image(self.root)
        for name in ("ro", "rw", "flat", "masked", "mnt", "new"):
            (self.root / name).mkdir()
        for name in ("file", "secret", "masked/inside"):
            (self.root / name).write_text("secret")
        self.file = directory / "file"
        self.file.write_text("a file of the host\n")
        self.volume = directory / "volume"
        (self.volume / "sub").mkdir(parents=True)
        self.volume.chmod(0o777)

    def default(self) -> dict[str, Any]:
        """containerd's default spec, with the probes as its program."""
        spec: dict[str, Any] = json.loads(self.containerd.ctr("oci", "spec").stdout)
        spec["root"] = {"path": str(self.root)}
        spec["process"]["args"] = ["sh", "-c", SCRIPT]
        spec["process"]["env"] = ["PATH=/bin", "WORDS=two words", "EMPTY="]
        spec["linux"]["cgroupsPath"] = f"/{self.containerd.namespace}/spec"
        return spec

    def run(self, spec: Mapping[str, Any], runtime: Runtime) -> Result:
        path = self.directory / "spec.json"
        path.write_text(json.dumps(spec))
        fixed = ["run", "--rm", "--runtime", runtime.name, "--fifo-dir", f"{self.containerd.directory}/fifo"]
        return self.containerd.ctr(*fixed, "--config", str(path), self.containerd.new_id("spec"), check=False)

    def tell(self, spec: Mapping[str, Any]) -> Both:
        told = []
        for runtime in (self.containerd.runtime, runc()):
            result = self.run(spec, runtime)
            assert result.stderr == b"", result
            told.append(taken_apart(result.stdout))
        return Both(*told)


@pytest.fixture(scope="module")
def specs(containerd: Containerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Specs]:
    # Whoever is not root in the container must be able to get through to the files.
    directory = tmp_path_factory.mktemp("specs")
    for parent in (directory, *directory.parents[:2]):
        parent.chmod(0o755)
    specs = Specs(containerd, directory)
    subprocess.run(["mount", "-t", "tmpfs", "nested", specs.volume / "sub"], check=True)
    try:
        (specs.volume / "sub/nested").touch()
        yield specs
    finally:
        subprocess.run(["umount", "--lazy", specs.volume / "sub"], check=True)


def everything(specs: Specs) -> dict[str, Any]:
    """A spec that uses whatever a container manager may write."""
    spec = specs.default()
    process, linux = spec["process"], spec["linux"]
    spec["hostname"] = "of-the-spec"
    spec["root"]["readonly"] = True
    process.update(
        user={"uid": 1000, "gid": 1000, "additionalGids": [10, 2000], "umask": 0o27},
        cwd="/home",
        oomScoreAdj=321,
        rlimits=[
            {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            {"type": "RLIMIT_NPROC", "soft": 333, "hard": 444},
            {"type": "RLIMIT_SIGPENDING", "soft": 55, "hard": 66},
        ],
        capabilities={
            "bounding": ["CAP_CHOWN", "CAP_NET_ADMIN", "CAP_SETUID"],
            "permitted": ["CAP_CHOWN", "CAP_NET_ADMIN"],
            "effective": ["CAP_CHOWN", "CAP_NET_ADMIN"],
            "inheritable": ["CAP_NET_ADMIN"],
            "ambient": ["CAP_NET_ADMIN"],
        },
    )
    linux["maskedPaths"] += ["/masked", "/secret"]
    linux["readonlyPaths"] += ["/home"]
    linux["sysctl"] = {
        "kernel.msgmax": "4096",
        "fs.mqueue.msg_max": "5",
        "net.ipv4.ip_forward": "1",
        "net.core.somaxconn": "77",
    }
    linux["devices"] = [
        {"path": "/dev/my-null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666, "uid": 5, "gid": 6},
        {"path": "/dev/pipe", "type": "p", "fileMode": 0o600, "uid": 1000, "gid": 0},
        {"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o600},
    ]
    linux["resources"].update(
        memory={"limit": 64 * MIB, "swap": 64 * MIB},
        cpu={"quota": 50_000, "period": 100_000, "shares": 512},
        pids={"limit": 12},
    )
    linux["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"},
            {"names": ["mknod", "mknodat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        ],
    }
    spec["mounts"] += [
        bind("/ro", specs.volume, "rbind", "ro"),
        bind("/rw", specs.volume, "rbind", "rw", "nosuid", "noexec"),
        bind("/flat", specs.volume, "bind", "ro"),
        bind("/file", specs.file, "bind", "ro"),
        {
            "destination": "/tmp",
            "type": "tmpfs",
            "source": "t",
            "options": ["size=1m", "mode=1777", "noexec"],
        },
        {"destination": "/new", "type": "tmpfs", "source": "t", "options": ["mode=700", "uid=1000", "gid=7"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid"]},
    ]
    shm = next(mount for mount in spec["mounts"] if mount["destination"] == "/dev/shm")
    shm["options"] = ["nosuid", "nodev", "noexec", "mode=1777", "size=2m"]
    return spec


def bind(destination: str, source: Path, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": str(source), "options": options}


@pytest.fixture(scope="module")
def plain(specs: Specs) -> Both:
    return specs.tell(specs.default())


@pytest.fixture(scope="module")
def full(specs: Specs) -> Both:
    return specs.tell(everything(specs))


def unexplained(probe: str, both: Both) -> list[str]:
    """Lines that only one of the runtimes has, and that no difference is listed for."""
    ours, theirs = Counter(both.ours[probe]), Counter(both.theirs[probe])
    sides = ((True, ours - theirs, "only here"), (False, theirs - ours, "only on runc"))
    return [
        f"{whose}: {line}"
        for side, lines, whose in sides
        for line in lines
        if not any(difference.explains(probe, line, ours=side) for difference in DIFFERENCES)
    ]


@pytest.mark.parametrize("probe", PROBES)
def test_the_default_spec_is_what_it_is_on_runc(plain: Both, probe: str) -> None:
    assert not unexplained(probe, plain)


@pytest.mark.parametrize("probe", PROBES)
def test_a_spec_that_uses_everything_is_what_it_is_on_runc(full: Both, probe: str) -> None:
    assert not unexplained(probe, full)


@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        ("identity", ["uid=1000(user) gid=1000(user) groups=10,2000", "0027", "/home"]),
        ("score", ["321"]),
        ("status", ["CapEff 0000000000001000", "CapBnd 0000000000001081", "NoNewPrivs 1", "Seccomp 2"]),
        ("environment", ["WORDS=two words", "EMPTY="]),
        ("rlimits", ["Max open files 100 200 files ", "Max pending signals 55 66 signals "]),
        ("hostname", ["of-the-spec"]),
        ("sysctls", ["kernel/msgmax:4096", "net/ipv4/ip_forward:1", "net/core/somaxconn:77"]),
        ("devices", ["my-null character special file 1:3 666 5 6", "pipe fifo 0:0 600 1000 0"]),
        ("devices", ["net/tun character special file a:c8 600 0 0"]),
        ("masked", ["/masked 0 0", "/secret 1 0"]),
        ("read-only", ["touch: //x: Read-only file system", "touch: /home/x: Read-only file system"]),
        ("read-only", ["sh: can't create /file: Read-only file system"]),
        ("volumes", ["a file of the host", "/ro/sub/nested", "/rw/sub/nested", "1000:1000:750"]),
        ("volumes", ["sh: /rw/true: Permission denied"]),
        ("seccomp", ["mkdir: can't create directory 'denied': Operation not permitted"]),
        ("seccomp", ["mkfifo: fifo: Function not implemented"]),
        ("memory", [str(64 * MIB)]),
        ("pids", ["12"]),
        ("cpu", ["50000 100000"]),
        ("forks", ["sh: can't fork: Resource temporarily unavailable"]),
        ("mounts", ["/dev/shm rw,nosuid,nodev,noexec,relatime tmpfs size=2048k"]),
        ("mounts", ["/new rw,relatime tmpfs gid=7 mode=700 uid=1000"]),
        ("mounts", ["/tmp rw,noexec,relatime tmpfs size=1024k"]),
    ],
)
def test_what_the_words_of_a_spec_are_in_the_container(full: Both, probe: str, expected: list[str]) -> None:
    assert set(expected) <= set(full.ours[probe])


def test_a_bind_that_is_not_recursive_leaves_nested_mounts_out(full: Both) -> None:
    assert "/flat/sub/nested" not in full.ours["volumes"]


def test_files_that_a_user_of_the_container_writes_are_that_users_on_the_host(
    specs: Specs, full: Both
) -> None:
    info = (specs.volume / "true").stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (1000, 1000, 0o750)


def test_a_user_namespace_is_refused_with_the_reason(
    specs: Specs, vm_runtime: Runtime, no_leaks: NoLeaks
) -> None:
    spec = specs.default()
    spec["linux"]["namespaces"].append({"type": "user"})
    mapping = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]
    spec["linux"].update(uidMappings=mapping, gidMappings=mapping)
    with no_leaks():
        result = specs.run(spec, vm_runtime)
    assert result.exit_status != 0
    assert b"linux.uidMappings and linux.gidMappings are not supported" in result.stderr, result


FLAGS = [
    "--cap-drop",
    "CAP_CHOWN",
    "--cap-add",
    "CAP_NET_ADMIN",
    "--allow-new-privs",
    "--seccomp",
    "--read-only",
]
FLAGS += ["--cwd", "/home", "--env", "MORE=of it", "--memory-limit", str(96 * MIB), "--cpus", "0.5"]
FLAGS += ["--mount", "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro:nosuid"]
FLAGS += ["--mount", "type=tmpfs,src=t,dst=/tmp,options=nosuid:size=4m", "--device", "/dev/null"]


def test_the_clients_flags_do_what_they_do_on_runc(containerd: Containerd) -> None:
    def tell(runtime: Runtime) -> Told:
        result = containerd.run("sh", "-c", SCRIPT, flags=["--runtime", runtime.name, *FLAGS])
        assert (result.exit_status, result.stderr) == (0, b""), result
        return taken_apart(result.stdout)

    both = Both(tell(containerd.runtime), tell(runc()))
    assert not [line for probe in PROBES for line in unexplained(probe, both)]
    assert {"CapEff 00000000a80435fa", "NoNewPrivs 0", "Seccomp 2"} <= set(both.ours["status"])
    assert (both.ours["memory"], both.ours["cpu"]) == ([str(96 * MIB)], ["50000 100000"])


@contextmanager
def with_limits(containerd: Containerd) -> Iterator[str]:
    """Have a container with limits, which runs out of memory as soon as there is a file /go."""
    flags = ["--memory-limit", str(64 * MIB), "--cpu-quota", "20000", "--cpu-period", "100000"]
    flags += ["--seccomp"]
    flags += [
        "--mount",
        "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro:nosuid",
        "--cap-drop",
        "CAP_KILL",
    ]
    script = "until [ -e /go ]; do sleep 0.2; done; exec dd if=/dev/zero of=/dev/null bs=200M count=1"
    with containerd.running("sh", "-c", script, flags=flags) as container:
        yield container


@pytest.fixture(scope="module")
def limited(containerd: Containerd) -> Iterator[str]:
    with with_limits(containerd) as container:
        yield container


def test_an_exec_has_the_confinement_of_its_container(containerd: Containerd, limited: str) -> None:
    script = r"grep -h '^\(Cap.*\|Seccomp\|NoNewPrivs\):' /proc/1/status; echo; "
    script += r"grep -h '^\(Cap.*\|Seccomp\|NoNewPrivs\):' /proc/self/status"
    result = containerd.exec(limited, "sh", "-c", script)
    init, own = result.stdout.decode().split("\n\n")
    assert init.splitlines() == own.splitlines()
    assert "Seccomp:\t2" in own


def test_metrics_tell_limits_and_use(containerd: Containerd, limited: str) -> None:
    lines = containerd.ctr("task", "metrics", limited).stdout.decode().splitlines()
    values = dict(line.split(maxsplit=1) for line in lines if "." in line.split(" ", 1)[0])
    assert int(values["memory.limit_in_bytes"]) == 64 * MIB
    assert 0 < int(values["memory.usage_in_bytes"]) < 64 * MIB
    assert int(values["cpuacct.usage"]) > 0
    assert int(values["pids.current"]) >= 1


def test_a_process_that_wants_more_cpu_time_than_it_may_have_is_throttled(
    containerd: Containerd, limited: str
) -> None:
    script = (
        "cd /sys/fs/cgroup; [ -e cpu.stat ] || cd cpu; until grep 'nr_throttled [1-9]' cpu.stat; do :; done"
    )
    assert containerd.exec(limited, "sh", "-c", script).exit_status == 0


def test_a_process_that_wants_more_memory_than_it_may_have_is_killed(
    containerd: Containerd, limited: str, events: Recorder
) -> None:
    result = containerd.exec(limited, "dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1")
    assert result.exit_status == 137
    events.wait_for(limited, "oom")
    assert containerd.task_status(limited) == "RUNNING"


def test_an_init_process_that_runs_out_of_memory_ends_its_container(
    containerd: Containerd, events: Recorder
) -> None:
    with with_limits(containerd) as container:
        assert containerd.exec(container, "touch", "/go").exit_status == 0
        told = events.wait_for(container, "exit", process=container)
        exits = [event.exit_status for event in told if event.body.get("id") == container]
        assert exits[-1:] == [137]
        assert containerd.task_status(container) == "STOPPED"
