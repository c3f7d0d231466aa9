from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vc.errors import AlreadyExists, NotFound, VCError
from vc.persist import store
from vc.persist.schema import BrokenRecord, SandboxRecord, format_record, parse_record
from vc.persist.store import Layout, SandboxLock

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")

records = st.builds(
    SandboxRecord,
    id=st.text(min_size=1),
    vmid=st.text(alphabet="0123456789abcdef", min_size=16, max_size=16),
    owner_pid=st.integers(1, 1 << 22),
    owner_start_ticks=st.integers(0, 1 << 60),
    config_path=st.text(),
    created_at=st.floats(0, 1e10),
)


def a_record(sandbox_id: str) -> SandboxRecord:
    return SandboxRecord(sandbox_id, "0" * 16, 1, 2, "/etc/configuration.toml", 3.0)


@given(records)
def test_a_record_survives_the_disk(record: SandboxRecord) -> None:
    assert parse_record(format_record(record)) == record


@given(st.binary(max_size=400))
def test_bytes_that_are_no_record_are_told_apart_and_never_crash(data: bytes) -> None:
    with pytest.raises(BrokenRecord):
        parse_record(data)


@pytest.mark.parametrize(
    "data",
    [b"[]", b"{}", b'{"version": 2}', b'{"version": 1}', b'{"version": 1, "id": 5}'],
)
def test_json_that_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(BrokenRecord):
        parse_record(data)


@pytest.mark.parametrize("change", [{"vmid": ""}, {"vmid": ".."}, {"vmid": "../vm"}, {"owner_pid": 0}])
def test_a_record_that_would_have_other_things_removed_is_refused(change: dict[str, Any]) -> None:
    """The directory of a VM without a name is that of all VMs, and process 0 is our own process group."""
    with pytest.raises(BrokenRecord, match="cannot be"):
        parse_record(format_record(replace(a_record("a"), **change)))


def test_a_name_that_could_not_be_noted_is_no_name_of_a_vm(tmp_path: Path) -> None:
    """Without a name every process would be the VM's that has "//shared" in its command line."""
    layout = Layout(tmp_path)
    store.make_private(layout.vm("00aa"))
    (layout.vm("00aa") / store.VMM_NAME).touch()
    assert layout.names_of("00aa") == {"00aa"}


def test_a_claimed_sandbox_is_private_and_cannot_be_claimed_again(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "vc")
    lock = store.claim(layout, "ns--a")
    try:
        assert stat.S_IMODE(layout.sandbox("ns--a").stat().st_mode) == 0o700
        with pytest.raises(AlreadyExists, match="ns--a"):
            store.claim(layout, "ns--a")
        assert not SandboxLock(layout.sandbox("ns--a")).acquire_nowait()
    finally:
        lock.release()
    assert SandboxLock(layout.sandbox("ns--a")).acquire_nowait()


@pytest.mark.parametrize("place", ["", "sbs"])
@pytest.mark.parametrize("change", ["mode", pytest.param("owner", marks=needs_root)])
def test_a_place_that_others_can_change_is_refused(tmp_path: Path, place: str, change: str) -> None:
    """Who can rename the directories of a sandbox has the clean-up remove what he likes, as root."""
    layout = Layout(tmp_path / "vc")
    store.make_private(layout.sandboxes)
    if change == "mode":
        (layout.run_dir / place).chmod(0o777)
    else:
        os.chown(layout.run_dir / place, 12345, -1)
    with pytest.raises(VCError, match="others can change what is there"):
        store.claim(layout, "ns--a")
    assert list(layout.sandboxes.iterdir()) == []


def test_a_saved_record_is_loaded_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    store.claim(layout, "a").release()
    store.save(layout, a_record("a"))
    assert store.load(layout, "a") == a_record("a")
    assert stat.S_IMODE((layout.sandbox("a") / store.RECORD).stat().st_mode) == 0o600
    assert list(store.sandbox_ids(layout)) == ["a"]


def test_a_sandbox_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nobody"):
        store.load(Layout(tmp_path), "nobody")
    assert list(store.sandbox_ids(Layout(tmp_path))) == []


def test_a_huge_record_is_not_read_into_memory(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    store.claim(layout, "a").release()
    (layout.sandbox("a") / store.RECORD).write_bytes(b" " * (2 << 20))
    with pytest.raises(BrokenRecord, match="more than"):
        store.load(layout, "a")


def test_a_run_dir_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "vc").write_text("a file where the directory should be")
    with pytest.raises(VCError, match=r"vc/sbs/a' *: Not a directory.*run_dir"):
        store.claim(Layout(tmp_path / "vc"), "a")


def test_a_record_that_cannot_be_written_leaves_nothing_that_would_block_the_next_try(
    tmp_path: Path,
) -> None:
    """Symptom: after "No space left on device" every later try said that the sandbox exists already."""
    layout = Layout(tmp_path)
    store.claim(layout, "a").release()
    (layout.sandbox("a") / store.RECORD).with_suffix(store.TEMPORARY).touch()  # as a full disk leaves it
    store.forget(layout, "a")
    store.claim(layout, "a").release()
