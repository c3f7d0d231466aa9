"""The decision between KVM and TCG, as a table."""

from pathlib import Path

import pytest

from vc.errors import Unsupported
from vc.hypervisor.accelerator import Facts, choose, decide, has_flags, parse_version, settle
from vc.hypervisor.base import VMConfig

GOOD = Facts(needs_flags=True, has_flags=True, device_error="", probe_error="")
NO_FLAGS = Facts(needs_flags=True, has_flags=False)
NO_DEVICE = Facts(needs_flags=True, has_flags=True, device_error="Permission denied")
HANGS = Facts(needs_flags=True, has_flags=True, device_error="", probe_error="it did not get through")
ARM = Facts(needs_flags=False, has_flags=False, device_error="", probe_error="")


@pytest.mark.parametrize(
    ("requested", "facts", "accelerator", "reason"),
    [
        ("auto", GOOD, "kvm", "a trial machine ran"),
        ("auto", ARM, "kvm", "a trial machine ran"),
        ("auto", NO_FLAGS, "tcg", "neither the vmx nor the svm flag"),
        ("auto", NO_DEVICE, "tcg", "does not open: Permission denied"),
        ("auto", HANGS, "tcg", "trial machine with KVM failed"),
        ("auto", Facts(needs_flags=True, has_flags=True, device_error=""), "tcg", "not tried"),
        ("tcg", GOOD, "tcg", 'accelerator = "tcg"'),
        ("kvm", GOOD, "kvm", 'accelerator = "kvm"'),
        ("kvm", NO_FLAGS, "kvm", "neither the vmx nor the svm flag"),
        ("kvm", HANGS, "kvm", "trial machine with KVM failed"),
    ],
)
def test_the_choice_and_its_reason(requested: str, facts: Facts, accelerator: str, reason: str) -> None:
    choice = decide(requested, facts)
    assert choice.accelerator == accelerator
    assert reason in "; ".join(choice.reasons)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu vme vmx sse\n", True),
        ("flags\t\t: fpu svm\n", True),
        ("flags\t\t: fpu hypervisor\nvmx flags\t: vnmi\n", False),
        ("model name\t: svm vmx\nflags\t\t: fpu\n", False),
        ("", False),
    ],
)
def test_only_the_list_of_flags_counts(tmp_path: Path, cpuinfo: str, expected: bool) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(cpuinfo)
    assert has_flags(file) is expected


def test_tcg_on_request_looks_at_nothing(tmp_path: Path) -> None:
    assert choose("tcg", tmp_path / "no-such-qemu").accelerator == "tcg"


def test_an_unknown_accelerator_is_refused() -> None:
    with pytest.raises(Unsupported, match='no accelerator "hvf"'):
        choose("hvf", Path("/nonexistent"))


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c)\n", (7, 2, 22)),
        ("QEMU emulator version 8.1.0\n", (8, 1, 0)),
        ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\n", (10, 0, 2)),
        ("QEMU emulator version 9.2\n", (9, 2)),
        ("", ()),
        ("usage: qemu\n", ()),
    ],
)
def test_the_version_is_the_one_behind_the_word(said: str, version: tuple[int, ...]) -> None:
    assert parse_version(said) == version


@pytest.mark.parametrize(
    ("version", "accelerator", "vcpus", "parallel"),
    [
        ("7.2.22", "tcg", 2, False),
        ("8.0.5", "tcg", 2, False),
        ("8.1.0", "tcg", 2, True),
        ("10.0.2", "tcg", 4, True),
        ("7.2.22", "tcg", 1, True),
        ("7.2.22", "kvm", 2, True),
        ("unknown", "tcg", 2, False),
    ],
)
def test_an_old_qemu_emulates_several_vcpus_in_turns(
    tmp_path: Path, version: str, accelerator: str, vcpus: int, parallel: bool
) -> None:
    """A guest with two vCPUs now and then never printed anything.

    Linux patches its code by a breakpoint that is there for a moment. QEMU before 8.1 could translate it on
    one vCPU while the other took it away again, and kept what it had translated.
    """
    qemu = tmp_path / "qemu"
    qemu.write_text(f"#!/bin/sh\necho 'QEMU emulator version {version} (Debian)'\n")
    qemu.chmod(0o755)
    config = VMConfig(
        qemu=qemu, kernel=Path("/vmlinux"), accelerator=accelerator, vcpus=vcpus, max_vcpus=vcpus
    )
    settled, choice = settle(config)
    assert (settled.accelerator, settled.parallel_vcpus) == (choice.accelerator, parallel)


def test_a_qemu_that_cannot_be_asked_counts_as_old(tmp_path: Path) -> None:
    config = VMConfig(
        qemu=tmp_path / "none", kernel=Path("/vmlinux"), accelerator="tcg", vcpus=2, max_vcpus=2
    )
    assert not settle(config)[0].parallel_vcpus
