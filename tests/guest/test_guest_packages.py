"""Which version is fetched, with what apt says when a tested version has left the mirrors."""

from pathlib import Path

import pytest
from guest.data import BuildError, load_recipe
from guest.packages import Apt, Lock, Pin, Store, load_lock, parse_policy, parse_records, save_lock

DATA = Path(__file__).resolve().parents[2] / "scripts" / "guest"
OLD, NEW, FOREIGN = "a" * 64, "b" * 64, "c" * 64

# The form of `apt-cache show`: one stanza for each version; a description's later lines begin with a space.
SHOWN = f"""\
Package: libc6
Version: 2.36-9+deb12u14
Architecture: amd64
Filename: pool/main/g/glibc/libc6_2.36-9+deb12u14_amd64.deb
SHA256: {NEW}
Description-en: GNU C Library: Shared libraries
 Contains the standard libraries that are used by nearly all programs.
 Version: not a field
Homepage: https://www.gnu.org/software/libc/libc.html

Package: libc6
Version: 2.36-9+deb12u14
Architecture: i386
SHA256: {FOREIGN}

Package: linux-image-cloud-amd64
Version: 6.1.192-2
Architecture: amd64
Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)
SHA256: {OLD}
"""
POLICY = """\
libc6:
  Installed: (none)
  Candidate: 2.36-9+deb12u14
  Version table:
     2.36-9+deb12u14 500
linux-image-cloud-amd64:
  Installed: (none)
  Candidate: 6.1.192-2
gone:
  Installed: (none)
  Candidate: (none)
"""


def apt() -> Apt:
    known = Apt("amd64")
    known.add(SHOWN, POLICY)
    return known


def test_stanzas_are_read_without_continuation_lines() -> None:
    first = parse_records(SHOWN)[0]
    assert first["Version"] == "2.36-9+deb12u14"
    assert first["Homepage"].startswith("https:")


def test_candidates_are_read_and_none_is_no_candidate() -> None:
    assert parse_policy(POLICY) == {"libc6": "2.36-9+deb12u14", "linux-image-cloud-amd64": "6.1.192-2"}


def test_the_locked_version_is_taken_while_apt_offers_it() -> None:
    locked = Pin("libc6", "2.36-9+deb12u14", NEW)
    assert apt().choose("libc6", locked) is locked


def test_the_candidate_is_taken_when_the_locked_version_has_gone() -> None:
    assert apt().choose("libc6", Pin("libc6", "2.36-9+deb12u7", OLD)) == Pin("libc6", "2.36-9+deb12u14", NEW)


def test_same_version_with_another_digest_is_not_the_locked_one() -> None:
    locked = Pin("libc6", "2.36-9+deb12u14", FOREIGN)  # another architecture's file
    assert apt().choose("libc6", locked).sha256 == NEW


def test_the_kernel_is_what_the_metapackage_depends_on() -> None:
    assert apt().kernel_of("linux-image-cloud-amd64") == "linux-image-6.1.0-56-cloud-amd64"


def test_a_package_that_apt_does_not_know_says_what_to_do() -> None:
    with pytest.raises(BuildError, match="no package gone for amd64: run `apt-get update`"):
        apt().choose("gone", None)


def test_the_lock_names_exactly_what_the_recipe_wants() -> None:
    recipe, lock = load_recipe(DATA / "guest.toml"), load_lock(DATA / "lock.json")
    assert {pin.name for pin in lock.packages} == {selection.name for selection in recipe.packages}
    assert {pin.name for pin in lock.wheels} == {selection.name for selection in recipe.wheels}
    assert lock.kernel is not None


def test_a_lock_survives_being_saved(tmp_path: Path) -> None:
    lock = Lock(
        Pin("linux-image-1", "1", OLD), (Pin("a", "1", OLD), Pin("b", "2", NEW)), (Pin("w", "3", NEW),)
    )
    save_lock(tmp_path / "lock.json", lock)
    assert load_lock(tmp_path / "lock.json") == lock


def test_a_file_with_the_wrong_digest_does_not_get_into_the_cache(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    (tmp_path / "file").write_bytes(b"something else")
    with pytest.raises(BuildError, match="libc6: downloaded file has SHA-256"):
        store.add(tmp_path / "file", OLD, ".deb", "libc6")
    assert store.find(OLD, ".deb") is None


def test_a_damaged_file_of_the_cache_is_fetched_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / f"{OLD}.deb").write_bytes(b"half a package")
    assert store.find(OLD, ".deb") is None
    assert not (tmp_path / f"{OLD}.deb").exists()
