"""The decision between KVM and TCG, as a table."""

from pathlib import Path

import pytest

from vc.errors import Unsupported
from vc.hypervisor.accelerator import Facts, choose, decide, has_flags

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
