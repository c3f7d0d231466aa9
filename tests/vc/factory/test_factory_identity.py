"""The key of a template changes with everything that is in the machine, and with nothing else."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vc.errors import HypervisorError
from vc.factory.identity import facts_of, key_of
from vc.hypervisor.base import SharedFSConfig, VMConfig


@pytest.fixture
def config(tmp_path: Path) -> VMConfig:
    for name in ("qemu", "kernel", "initrd", "image", "other"):
        (tmp_path / name).write_text(name)
    return VMConfig(
        qemu=tmp_path / "qemu",
        kernel=tmp_path / "kernel",
        initrd=tmp_path / "initrd",
        image=tmp_path / "image",
        arch="x86_64",
        accelerator="tcg",
    )


def key(config: VMConfig, *, has_vsock: bool = False, **host: str) -> str:
    return key_of(facts_of(config, has_vsock=has_vsock, host=host))


@pytest.mark.parametrize(
    "change",
    [
        {"memory_mib": 512},
        {"vcpus": 2, "max_vcpus": 2},
        {"max_vcpus": 4},
        {"kernel_params": ("agent.log=debug",)},
        {"cpu_features": "pmu=off"},
        {"cpu_model": "qemu64"},
        {"machine_accelerators": "kernel_irqchip=split"},
        {"accelerator": "kvm"},
        {"seccomp_sandbox": "off"},
        {"entropy_source": Path("/dev/random")},
        {"agent_debug": True},
        {"container_pipe_size": 4096},
        {"debug": True},
        {"rootfs_type": "erofs"},
        {"initrd": None},
        {"image": None},
    ],
    ids=str,
)
def test_what_is_in_the_machine_changes_the_key(config: VMConfig, change: dict[str, Any]) -> None:
    assert key(replace(config, **change)) != key(config)


@pytest.mark.parametrize("name", ["qemu", "kernel", "initrd", "image"])
def test_a_replaced_file_changes_the_key(config: VMConfig, tmp_path: Path, name: str) -> None:
    before = key(config)
    (tmp_path / "other").replace(tmp_path / name)
    assert key(config) != before


@pytest.mark.parametrize("name", ["qemu", "kernel", "initrd", "image"])
def test_a_file_changed_in_place_changes_the_key(config: VMConfig, tmp_path: Path, name: str) -> None:
    before = key(config)
    os.utime(tmp_path / name, ns=(0, 1))
    assert key(config) != before


def test_what_comes_later_does_not_change_the_key(config: VMConfig) -> None:
    later = replace(
        config,
        shared_fs=SharedFSConfig(daemon=Path("/usr/lib/qemu/virtiofsd")),
        run_dir=Path("/somewhere/else"),
        dial_timeout=1.0,
    )
    assert key(later) == key(config)


def test_the_way_to_the_agent_and_the_host_are_in_the_key(config: VMConfig) -> None:
    keys = {key(config), key(config, has_vsock=True), key(config, kernel="6.1"), key(config, kernel="6.2")}
    assert len(keys) == 4


def test_a_key_is_a_file_name_and_always_the_same(config: VMConfig) -> None:
    assert key(config) == key(config)
    assert len(key(config)) == 32
    assert set(key(config)) <= set("0123456789abcdef")


def test_a_missing_file_is_named(config: VMConfig) -> None:
    with pytest.raises(HypervisorError, match="/does/not/exist"):
        key(replace(config, kernel=Path("/does/not/exist")))
