"""Who killed a process: the kernel's own words for it, and real victims."""

import os
import signal

import pytest

from tests.harness import cgroups
from vc.hypervisor.children import running
from vc.hypervisor.oom import find_victim

# Linux 6.18, read from /dev/kmsg.
MEMCG = b"3,1012,10589310517,-;Memory cgroup out of memory: Killed process 26916 (dd) total-vm:133340kB\n"
GLOBAL = b"3,1013,10589310519,-;Out of memory: Killed process 26917 (qemu-system-x86) total-vm:99kB\n"
OTHER = b"6,1014,11098969008,-;cgroup: fork rejected by pids controller in /26916\n DEVICE=+26916\n"
LIMIT = 16 << 20  # bytes


@pytest.mark.parametrize(
    ("record", "pid", "said"),
    [
        (MEMCG, 26916, "Memory cgroup out of memory: Killed process 26916 (dd)"),
        (GLOBAL, 26917, "Out of memory: Killed process 26917 (qemu-system-x86)"),
        (MEMCG, 2691, ""),
        (MEMCG, 6916, ""),
        (OTHER, 26916, ""),
        (b"\xff nonsense", 1, ""),
        (b"", 1, ""),
    ],
)
def test_only_the_line_about_this_very_process_counts(record: bytes, pid: int, said: str) -> None:
    assert find_victim(record, pid) == said


def eats_memory(group: object) -> list[str]:
    return ["sh", "-c", f"echo $$ >{group}/cgroup.procs; exec dd if=/dev/zero of=/dev/null bs=256M count=1"]


@pytest.fixture
def memory_group() -> object:
    if os.geteuid() != 0:
        pytest.skip("needs root: makes a control group")
    if why := cgroups.missing("memory"):
        pytest.skip(why)
    return None


@pytest.mark.usefixtures("memory_group")
async def test_a_victim_of_the_oom_killer_is_said_to_be_one() -> None:
    with cgroups.limited("memory", LIMIT) as group:
        async with running(eats_memory(group), name="thing") as child:
            cause = await child.wait_dead()
    assert f"thing (pid {child.pid}) was killed by SIGKILL; it was the host's OOM killer" in cause
    assert child.out_of_memory


@pytest.mark.usefixtures("memory_group")
async def test_another_one_s_death_by_the_oom_killer_is_not_taken_for_this_one_s() -> None:
    async with running(["sleep", "1000"], name="survivor") as survivor:
        with cgroups.limited("memory", LIMIT) as group:
            async with running(eats_memory(group), name="victim") as victim:
                await victim.wait_dead()
        os.kill(survivor.pid, signal.SIGKILL)
        cause = await survivor.wait_dead()
    assert cause == f"survivor (pid {survivor.pid}) was killed by SIGKILL"
    assert not survivor.out_of_memory
