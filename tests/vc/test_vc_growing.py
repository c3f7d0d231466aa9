"""How far a VM can grow: what its machine has room for, and what its kernel bears."""

from dataclasses import replace
from pathlib import Path

import pytest

from vc.growing import MAX_GROWTH, can_add_processors, can_grow
from vc.hypervisor.base import VMConfig

BASE = VMConfig(
    qemu=Path("/qemu"),
    kernel=Path("/kernel"),
    memory_mib=512,
    vcpus=1,
    max_vcpus=4,
    memory_slots=10,
    max_memory_mib=2048,
)


@pytest.mark.parametrize(("vcpus", "memory_mib"), [(1, 512), (4, 512), (1, 513), (1, 2048), (2, 1000)])
def test_it_grows_up_to_what_the_machine_has_room_for(vcpus: int, memory_mib: int) -> None:
    assert can_grow(BASE, replace(BASE, vcpus=vcpus, memory_mib=memory_mib)) == ""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"vcpus": 5}, "it has 1 vCPUs and can have up to 4, the pod is to have 5"),
        ({"memory_mib": 2049}, "it has 512 MiB and can have up to 2048, the pod is to have 2049"),
        ({"memory_mib": 256}, "it has 512 MiB and can have up to 2048, the pod is to have 256"),
    ],
)
def test_what_it_cannot_become_is_said(change: dict[str, int], why: str) -> None:
    assert can_grow(BASE, replace(BASE, **change)) == why  # type: ignore[arg-type]


def test_without_slots_memory_stays() -> None:
    base = replace(BASE, memory_slots=0)
    assert "can have up to 512" in can_grow(base, replace(base, memory_mib=640))


def test_the_room_is_whole_blocks() -> None:
    base = replace(BASE, max_memory_mib=700)
    assert can_grow(base, replace(base, memory_mib=640)) == ""
    assert "can have up to 640" in can_grow(base, replace(base, memory_mib=641))


def test_a_small_guest_is_not_given_more_than_it_can_account_for() -> None:
    base = replace(BASE, memory_mib=128, max_memory_mib=1 << 20)
    assert can_grow(base, replace(base, memory_mib=128 * MAX_GROWTH)) == ""
    assert can_grow(base, replace(base, memory_mib=128 * MAX_GROWTH + 1)) != ""


@pytest.mark.parametrize(
    ("version", "vcpus", "refused"), [("7.2.22", 2, True), ("7.2.22", 1, False), ("8.1.0", 2, False)]
)
def test_processors_are_plugged_only_into_an_emulator_that_runs_them_safely(
    tmp_path: Path, version: str, vcpus: int, refused: bool
) -> None:
    """See `PARALLEL_TCG`: the machine was started with one thread for each, when it had one."""
    qemu = tmp_path / "qemu"
    qemu.write_text(f"#!/bin/sh\necho 'QEMU emulator version {version}'\n")
    qemu.chmod(0o755)
    base = replace(BASE, qemu=qemu, accelerator="tcg")
    assert bool(can_add_processors(base, replace(base, vcpus=vcpus))) is refused
