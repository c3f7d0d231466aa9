"""Control groups: read as the kernel shows them, and changed for a real process."""

import subprocess
from pathlib import Path

import pytest

from tests.harness.cgroups import limited, missing
from vc.hypervisor.groups import bring_here, directory_of, parse_groups, parse_mounts

V1 = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 /pod /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
"""


@pytest.mark.parametrize(
    ("line", "directory"),
    [
        ("3:cpu,cpuacct:/a/b", "/sys/fs/cgroup/cpu,cpuacct/a/b"),
        ("1:name=systemd:/", "/sys/fs/cgroup/systemd"),
        ("0::/pod/x:y", "/sys/fs/cgroup/unified/x:y"),
        ("0::/pod", "/sys/fs/cgroup/unified"),
        ("0::/podium", None),
        ("4:memory:/a", None),
    ],
)
def test_the_directory_of_a_group(line: str, directory: str | None) -> None:
    [(controllers, group)] = parse_groups(line).items()
    expected = None if directory is None else Path(directory)
    assert directory_of(controllers, group, parse_mounts(V1)) == expected


def test_a_process_comes_into_our_groups() -> None:
    if why := missing("pids"):
        pytest.skip(why)
    with limited("pids", 10) as group, subprocess.Popen(["sleep", "1000"]) as process:
        before = Path(f"/proc/{process.pid}/cgroup").read_text()
        (group / "cgroup.procs").write_text(str(process.pid))
        assert Path(f"/proc/{process.pid}/cgroup").read_text() != before
        bring_here(process.pid)
        assert (
            Path(f"/proc/{process.pid}/cgroup").read_text() == before == Path("/proc/self/cgroup").read_text()
        )
        process.kill()
        process.wait()


def test_a_process_that_is_gone_is_no_error() -> None:
    bring_here(2**22 + 1)
