"""What a pod's annotations may change, and what they may not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vc.config import (
    AgentConfig,
    Config,
    HypervisorConfig,
    RuntimeConfig,
    apply_annotations,
    keys,
)
from vc.config.annotations import merge_kernel_params
from vc.errors import InvalidArgument, Unsupported, VCError

H = "io.katacontainers.config.hypervisor."
A = "io.katacontainers.config.agent."
R = "io.katacontainers.config.runtime."
CPUS = 8


def config(**hypervisor: Any) -> Config:
    values = {"enable_annotations": (".*",), "image": Path("/i"), "default_maxvcpus": CPUS, **hypervisor}
    return Config(Path("/c.toml"), HypervisorConfig(**values))


def applied(annotations: dict[str, str], base: Config | None = None) -> Config:
    return apply_annotations(base or config(), annotations, CPUS)


def refusal(annotations: dict[str, str], base: Config | None = None) -> str:
    with pytest.raises(InvalidArgument) as caught:
        applied(annotations, base)
    return str(caught.value)


def test_a_pod_without_wishes_gets_the_very_same_config() -> None:
    base = config()
    others = {"io.kubernetes.cri.container-type": "sandbox", "io.katacontainers.pkg.oci.bundle_path": "/b"}
    assert applied(others, base) is base


@pytest.mark.parametrize(
    ("name", "text", "key", "value"),
    [
        ("default_vcpus", "2.5", "default_vcpus", 2.5),
        ("default_max_vcpus", "4", "default_maxvcpus", 4),
        ("default_memory", "512", "default_memory", 512),
        ("machine_type", "virt", "machine_type", "virt"),
        ("shared_fs", "none", "shared_fs", "none"),
        ("virtio_fs_cache", "none", "virtio_fs_cache", "never"),
        ("virtio_fs_extra_args", '["-a", "b c"]', "virtio_fs_extra_args", ("-a", "b c")),
        ("entropy_source", "/dev/random", "entropy_source", Path("/dev/random")),
    ],
)
def test_hypervisor_keys_change(name: str, text: str, key: str, value: object) -> None:
    base = config()
    changed = applied({H + name: text}, base)
    assert changed == replace(base, hypervisor=replace(base.hypervisor, **{key: value}))


def test_agent_and_runtime_keys_change_without_permission() -> None:
    wishes = {
        A + "kernel_modules": "e1000e InterruptThrottleRate=3000; i915",
        A + "container_pipe_size": "65536",
        R + "disable_guest_seccomp": "True",
        R + "create_container_timeout": "90",
        R + "internetworking_model": "none",
        R + "disable_new_netns": "t",
    }
    changed = applied(wishes, config(enable_annotations=()))
    assert changed.agent == AgentConfig(
        kernel_modules=("e1000e InterruptThrottleRate=3000", "i915"), container_pipe_size=65536
    )
    assert changed.runtime == RuntimeConfig(
        disable_guest_seccomp=True,
        create_container_timeout=90.0,
        internetworking_model="none",
        disable_new_netns=True,
    )
    [warning] = changed.warnings
    assert "disable_new_netns" in warning and "has no effect" in warning


@pytest.mark.parametrize(
    ("allowed", "name", "enabled"),
    [
        ((), "default_memory", False),
        (("default_memory",), "default_memory", True),
        (("default_.*",), "default_memory", True),
        (("memory$",), "default_memory", True),  # it must occur, not match: as in Kata
        (("^memory",), "default_memory", False),
        (("x", "default_mem"), "default_memory", True),
    ],
)
def test_only_enabled_annotations_may_touch_the_hypervisor(
    allowed: tuple[str, ...], name: str, enabled: bool
) -> None:
    base = config(enable_annotations=allowed)
    if enabled:
        assert applied({H + name: "300"}, base).hypervisor.default_memory == 300
    else:
        assert refusal({H + name: "300"}, base).startswith(f"annotation {H}{name} is not enabled")


@pytest.mark.parametrize(
    ("wishes", "text"),
    [
        (
            {H + "default_memory": "-1"},
            "Error parsing annotation for default_memory: Please specify positive numeric value",
        ),
        (
            {H + "default_memory": "1e3"},
            "Error parsing annotation for default_memory: Please specify positive numeric value",
        ),
        (
            {H + "default_vcpus": "²"},
            "Error parsing annotation for default_vcpus: Please specify positive numeric value",
        ),
        (
            {R + "disable_guest_seccomp": "yes"},
            "Error parsing annotation for disable_guest_seccomp: Please specify boolean value 'true|false'",
        ),
        ({H + "virtio_fs_extra_args": "-x"}, "Please specify a JSON list of strings"),
        ({H + "virtio_fs_extra_args": "[" * 9999}, "Please specify a JSON list of strings"),
        ({H + "shared_fs": "virtio-9p"}, 'got "virtio-9p" (a string), must be one of'),
        ({H + "cpu_features": "a\nb"}, "must be a string without control characters"),
        ({H + "default_memory": "255"}, "is less than minimum required 256, please specify a larger value"),
        (
            {H + "default_vcpus": "8.5"},
            "Number of cpus 8.5 specified in annotation default_vcpus is greater than the number of CPUs 8",
        ),
        (
            {H + "default_max_vcpus": "9"},
            "Number of cpus 9 specified in annotation default_max_vcpus is greater than the number of CPUs 8",
        ),
        ({R + "experimental": "newstore"}, "must be absent, for nothing is supported"),
        ({R + "disable_new_netns": "true"}, "only works with 'none' internetworking_model"),
        (
            {H + "kernel": "/nowhere/vmlinux"},
            f"annotation {H}kernel = /nowhere/vmlinux: No such file or directory",
        ),
        ({H + "image": "relative"}, "must be an absolute path"),
        ({H + "image": ""}, "image or initrd must be defined"),
    ],
)
def test_a_wrong_wish_is_refused_in_katas_words(wishes: dict[str, str], text: str) -> None:
    assert text in refusal(wishes)


@pytest.mark.parametrize(
    ("globs", "path", "valid"),
    [
        ((), "qemu-b", False),
        (("@/qemu-a",), "qemu-b", False),
        (("@/qemu-b",), "qemu-b", True),
        (("@/qemu-*",), "qemu-b", True),
        (("@/*",), "sub/qemu-c", False),
        (("@/sub/*",), "sub/../qemu-b", False),
        (("qemu-b", ""), "qemu-b", False),
    ],
)
def test_a_program_must_match_a_glob_of_its_list(
    tmp_path: Path, globs: tuple[str, ...], path: str, valid: bool
) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("qemu-a", "qemu-b", "sub/qemu-c"):
        (tmp_path / name).write_bytes(b"x")
    base = config(valid_hypervisor_paths=tuple(glob.replace("@", str(tmp_path)) for glob in globs))
    wish = {H + "path": f"{tmp_path}/{path}"}
    if valid:
        assert applied(wish, base).hypervisor.path == tmp_path / path
    else:
        assert f"path {tmp_path}/{path} required from annotation is not valid" in refusal(wish, base)


def test_kernel_parameters_are_merged() -> None:
    base = config(kernel_params="quiet console=hvc0 agent.log=info")
    changed = applied({H + "kernel_params": "agent.log=debug x"}, base)
    assert changed.hypervisor.kernel_params == "quiet console=hvc0 agent.log=debug x"


@pytest.mark.parametrize(
    ("base", "more", "merged"),
    [
        ("", "", ""),
        ("a=1 b", "", "a=1 b"),
        ("a=1 b", "a=2", "b a=2"),
        ('a="x y" b', 'c="p q"', 'a="x y" b c="p q"'),
        ('a="x y" b', 'a="z  w"', 'b a="z  w"'),
        ("a", 'b="open', 'a b="open'),
    ],
)
def test_merging_replaces_namesakes_and_keeps_quotes(base: str, more: str, merged: str) -> None:
    assert merge_kernel_params(base, more) == merged


@pytest.mark.parametrize("name", [H + "kernel_hash", H + "cc_init_data", A + "policy"])
def test_a_promise_that_cannot_be_kept_is_refused(name: str) -> None:
    with pytest.raises(Unsupported, match=re.escape(name)):
        applied({name: "abc"})


def test_wishes_that_do_nothing_are_told_unless_they_ask_for_nothing() -> None:
    changed = applied(
        {H + "enable_iommu": "false", H + "enable_hugepages": "true", H + "oops": "1", A + "x": "y"}
    )
    assert changed.warnings == (
        f'annotation {H}enable_hugepages = "true" (a string) has no effect: it is not implemented',
        f'annotation {H}oops = "1" (a string) has no effect: it is unknown',
        f'annotation {A}x = "y" (a string) has no effect: it is unknown',
    )


SUFFIXES = [H + key.annotation for key in keys(HypervisorConfig) if key.annotation]
SUFFIXES += [A + key.annotation for key in keys(AgentConfig) if key.annotation]
SUFFIXES += [R + key.annotation for key in keys(RuntimeConfig) if key.annotation]


@given(
    st.dictionaries(st.sampled_from(SUFFIXES) | st.text().map(H.__add__), st.text() | st.integers().map(str))
)
def test_any_annotations_give_a_config_or_one_of_our_errors(annotations: dict[str, str]) -> None:
    try:
        changed = applied(annotations)
    except VCError as exc:
        assert str(exc).isprintable()
    else:
        assert 1 <= changed.hypervisor.default_vcpus <= CPUS
        assert changed.hypervisor.default_memory >= 256
