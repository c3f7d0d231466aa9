"""What a machine must know to be saved and restored: its command line, QMP's words."""

from pathlib import Path

import pytest

from vc.hypervisor.base import VMConfig
from vc.hypervisor.qemu import qmp
from vc.hypervisor.qemu.command import Wiring, command_line

CONFIG = VMConfig(qemu=Path("/qemu"), kernel=Path("/kernel"), memory_mib=64, arch="x86_64", accelerator="tcg")


def argv(wiring: Wiring) -> list[str]:
    return command_line(CONFIG, wiring, vmid="v", uuid="u")


def test_memory_that_we_have_replaces_that_of_qemu() -> None:
    own, ours = argv(Wiring(qmp=3, console=4)), argv(Wiring(qmp=3, console=4, memory=7))
    assert [(a, b) for a, b in zip(own, ours, strict=True) if a != b] == [
        (
            "memory-backend-memfd,id=memory,size=64M,share=on",
            "memory-backend-file,mem-path=/proc/self/fd/7,id=memory,size=64M,share=on",
        )
    ]


def test_a_restored_machine_waits_instead_of_booting() -> None:
    booted, restored = (argv(Wiring(qmp=3, console=4, memory=7, restored=flag)) for flag in (False, True))
    at = restored.index("-incoming")
    assert restored[at : at + 3] == ["-incoming", "defer", "-S"]
    assert restored[:at] + restored[at + 3 :] == booted


# QEMU 7.2's own lines, the timestamps left out
@pytest.mark.parametrize(
    ("status", "event"),
    [
        ("completed", qmp.Migrated(completed=True)),
        ("failed", qmp.Migrated(completed=False)),
        ("cancelled", qmp.Migrated(completed=False)),
        ("setup", None),
        ("active", None),
        (["completed"], None),
        (None, None),
    ],
)
def test_the_end_of_a_migration_is_an_event(status: object, event: object) -> None:
    assert qmp.parse_event_untrusted({"event": "MIGRATION", "data": {"status": status}}) == event


def test_no_program_is_run_to_save_or_restore() -> None:
    """QEMU could not run one: its sandbox denies that."""
    for command in (qmp.migrate("state"), qmp.migrate_incoming("state")):
        assert command.arguments == {"uri": "fd:state"}
