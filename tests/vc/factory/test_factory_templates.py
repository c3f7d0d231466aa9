"""Templates on disk: whole or not there, ours alone or not used."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vc.errors import VCError
from vc.factory.templates import (
    KEEP,
    BrokenTemplate,
    ForeignTemplate,
    Manifest,
    Templates,
    format_manifest,
    parse_manifest,
)

KEY = "0123456789abcdef"


def manifest(key: str = KEY) -> Manifest:
    return Manifest(
        key=key,
        memory_mib=1,
        vcpus=1,
        memory_bytes=6,
        data_bytes=6,
        state_bytes=5,
        memory_checksum=1,
        state_checksum=2,
        details=base64.b64encode(b"details").decode(),
        made_at=12.5,
        facts={"format": 1},
    )


def make(templates: Templates, key: str = KEY) -> Path:
    with templates.locked(wait=True), templates.new(key) as directory:
        (directory / "memory").write_bytes(b"memory")
        (directory / "state").write_bytes(b"state")
        (directory / "manifest.json").write_bytes(format_manifest(manifest(key)))
    return templates.directory / key


@pytest.fixture
def templates(tmp_path: Path) -> Templates:
    return Templates(tmp_path / "base" / "template")


def is_there(templates: Templates, key: str = KEY) -> bool:
    with templates.opened(key) as template:
        return template is not None


def test_there_is_none_before_one_is_made(templates: Templates) -> None:
    assert not is_there(templates)
    assert templates.keys() == []
    make(templates)
    assert is_there(templates)
    assert not is_there(templates, "another")


def test_an_open_template_outlives_its_removal(templates: Templates) -> None:
    make(templates)
    with templates.opened(KEY) as template:
        assert template is not None
        templates.discard(KEY)
        assert not is_there(templates)
        assert os.read(template.memory, 100) == b"memory"
        assert os.read(template.state, 100) == b"state"
        assert template.manifest == manifest()
        assert template.manifest.guest_details == b"details"


def test_everything_is_private_whatever_the_umask(templates: Templates) -> None:
    old = os.umask(0)
    try:
        place = make(templates)
    finally:
        os.umask(old)
    paths = [templates.directory, place, templates.directory / "lock", *place.iterdir()]
    assert {path.name: path.stat().st_mode & 0o777 for path in paths} == {
        "template": 0o700, KEY: 0o700, "lock": 0o600, "memory": 0o600, "state": 0o600, "manifest.json": 0o600
    }  # fmt: skip


@pytest.mark.parametrize("name", ["", KEY, f"{KEY}/memory", f"{KEY}/state", f"{KEY}/manifest.json"])
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o704, 0o720])
def test_what_others_can_reach_is_refused(templates: Templates, name: str, mode: int) -> None:
    make(templates)
    (templates.directory / name).chmod(mode)
    with pytest.raises(ForeignTemplate, match=f"has mode {mode:o}"), templates.opened(KEY):
        pass
    assert (templates.directory / KEY).exists(), "what may be somebody else's is not removed"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives files away")
@pytest.mark.parametrize("name", ["", KEY, f"{KEY}/memory", f"{KEY}/state", f"{KEY}/manifest.json"])
def test_what_another_user_owns_is_refused(templates: Templates, name: str) -> None:
    make(templates)
    os.chown(templates.directory / name, 12345, -1)
    with pytest.raises(ForeignTemplate, match="belongs to user 12345"), templates.opened(KEY):
        pass


def test_no_template_is_made_in_a_place_of_others(templates: Templates) -> None:
    templates.directory.mkdir(mode=0o777, parents=True)
    templates.directory.chmod(0o777)
    with pytest.raises(ForeignTemplate), templates.locked(wait=False):
        pass
    assert list(templates.directory.iterdir()) == []


def test_links_are_not_followed(templates: Templates, tmp_path: Path) -> None:
    place = make(templates)
    elsewhere = place.rename(tmp_path / "elsewhere")
    place.symlink_to(elsewhere)
    with pytest.raises(ForeignTemplate, match="no directory of ours"), templates.opened(KEY):
        pass
    place.unlink()
    elsewhere.rename(place)
    (place / "memory").rename(tmp_path / "memory")
    (place / "memory").symlink_to(tmp_path / "memory")
    with pytest.raises(BrokenTemplate, match="'memory' cannot be opened"), templates.opened(KEY):
        pass


def shorten(place: Path) -> None:
    os.truncate(place / "memory", 3)


def lose(place: Path) -> None:
    (place / "state").unlink()


def swap(place: Path) -> None:
    (place / "manifest.json").write_bytes(format_manifest(manifest("another")))


def scribble(place: Path) -> None:
    (place / "manifest.json").write_bytes(b"{")


def block(place: Path) -> None:
    (place / "state").unlink()
    os.mkfifo(place / "state", 0o600)


@pytest.mark.parametrize("damage", [shorten, lose, swap, scribble, block])
def test_a_damaged_template_is_broken(templates: Templates, damage: Callable[[Path], None]) -> None:
    damage(make(templates))
    with pytest.raises(BrokenTemplate), templates.opened(KEY):
        pass


def test_a_template_that_fails_is_not_there(templates: Templates) -> None:
    with pytest.raises(RuntimeError), templates.locked(wait=True), templates.new(KEY) as directory:
        (directory / "memory").write_bytes(b"x")
        raise RuntimeError
    assert [path.name for path in templates.directory.iterdir()] == ["lock"]


def test_a_new_template_replaces_a_damaged_one(templates: Templates) -> None:
    shorten(make(templates))
    make(templates)
    assert is_there(templates)
    assert {path.name for path in templates.directory.iterdir()} == {"lock", KEY}


def test_the_oldest_templates_go(templates: Templates) -> None:
    for number in range(KEEP + 2):
        place = make(templates, f"key{number}")
        os.utime(place, ns=(number, number))
    make(templates, "newest")
    assert templates.keys() == ["newest", f"key{KEEP + 1}", f"key{KEEP}"][:KEEP]


HOLD = """
import sys
from pathlib import Path
from vc.factory.templates import Templates
templates = Templates(Path(sys.argv[1]))
with templates.locked(wait=True) as ours, templates.new("key") as directory:
    (directory / "memory").write_bytes(b"x")
    print(ours, flush=True)
    sys.stdin.read()
"""


def test_a_maker_keeps_others_out_and_its_death_leaves_waste_that_the_next_one_removes(
    templates: Templates,
) -> None:
    argv = [sys.executable, "-c", HOLD, str(templates.directory)]
    maker = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=".")
    )
    try:
        assert maker.stdout is not None
        assert maker.stdout.readline() == b"True\n"
        with templates.locked(wait=False) as ours:
            assert not ours
        assert templates.keys() == []
    finally:
        maker.kill()
        maker.communicate()
    assert [path.name[:4] for path in templates.directory.glob("tmp-*")] == ["tmp-"]
    with templates.locked(wait=False) as ours:
        assert ours
        assert [path.name for path in templates.directory.iterdir()] == ["lock"]


def test_a_failure_is_remembered_for_its_key_until_a_template_is_made(templates: Templates) -> None:
    with templates.locked(wait=True):
        templates.note_failure(KEY, "no kernel")
    failure = templates.failure(KEY)
    assert failure is not None
    assert failure[1] == "no kernel"
    assert -1 < failure[0] < 60
    assert templates.failure("another") is None
    make(templates)
    assert templates.failure(KEY) is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"key": "0123456789abcdef"}', '{"key": 1, "at": "x", "text": 2}']
)
def test_an_unreadable_failure_is_none(templates: Templates, text: str) -> None:
    make(templates)
    (templates.directory / "failed.json").write_text(text)
    assert templates.failure(KEY) is None


def test_remove_all_leaves_the_lock_alone(templates: Templates) -> None:
    make(templates)
    make(templates, "another")
    with templates.locked(wait=True):
        templates.note_failure(KEY, "x")
        templates.remove_all()
    assert [path.name for path in templates.directory.iterdir()] == ["lock"]


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(VCError, match="file/template"),
        Templates(tmp_path / "file" / "template").locked(wait=True),
    ):
        pass


def test_a_manifest_comes_back() -> None:
    assert parse_manifest(format_manifest(manifest())) == manifest()


@pytest.mark.parametrize(
    "change",
    [
        {"memory_bytes": 0}, {"memory_bytes": "6"}, {"vcpus": True}, {"state_bytes": -1}, {"key": 5},
        {"made_at": "now"}, {"details": "?"}, {"details": 5}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_lies_is_broken(change: dict[str, object]) -> None:
    fields = {**json.loads(format_manifest(manifest())), **change}
    with pytest.raises(BrokenTemplate):
        parse_manifest(json.dumps(fields).encode())


@given(
    st.binary()
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_any_bytes_are_a_manifest_or_broken(data: bytes) -> None:
    with pytest.raises(BrokenTemplate):
        parse_manifest(data)
