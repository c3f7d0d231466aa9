"""virtiofsd's two command lines as data."""

from pathlib import Path

import pytest

from vc.errors import HypervisorError
from vc.hypervisor.base import SharedFSConfig
from vc.storage.sharedfs import Flavour, ask_flavour, command_line, flavour_of, virtiofsd

CONFIG = SharedFSConfig(daemon=Path("/x/virtiofsd"), cache="auto", extra_args=("--thread-pool-size=1",))
DIRECTORY = Path("/run/vc/vm/0123456789abcdef/shared")


def test_the_program_in_c() -> None:
    assert command_line(CONFIG, Flavour.C, directory=DIRECTORY, descriptor=9) == [
        *("/x/virtiofsd", "--fd=9"),
        *("-o", f"source={DIRECTORY}/.,cache=auto,sandbox=namespace,announce_submounts"),
        *("-o", "no_posix_lock", "--thread-pool-size=1"),
    ]


def test_the_program_in_rust() -> None:
    assert command_line(CONFIG, Flavour.RUST, directory=DIRECTORY, descriptor=9) == [
        *("/x/virtiofsd", "--fd=9", "--shared-dir", f"{DIRECTORY}/.", "--cache", "auto"),
        *("--sandbox", "namespace", "--announce-submounts", "--thread-pool-size=1"),
    ]


@pytest.mark.parametrize(
    ("cache", "in_c", "in_rust"),
    [
        ("never", "none", "never"),
        ("metadata", "none", "metadata"),
        ("auto", "auto", "auto"),
        ("always", "always", "always"),
    ],
)
def test_each_has_its_own_words_for_caching(cache: str, in_c: str, in_rust: str) -> None:
    config = SharedFSConfig(daemon=Path("/x/virtiofsd"), cache=cache)
    line = command_line(config, Flavour.C, directory=DIRECTORY, descriptor=9)
    assert f"cache={in_c}" in line[line.index("-o") + 1].split(",")
    line = command_line(config, Flavour.RUST, directory=DIRECTORY, descriptor=9)
    assert line[line.index("--cache") + 1] == in_rust


def test_a_comma_in_the_path_begins_no_option_of_the_program_in_c() -> None:
    line = command_line(CONFIG, Flavour.C, directory=Path("/a,allow_root\\b"), descriptor=9)
    assert line[line.index("-o") + 1].startswith("source=/a\\,allow_root\\\\b/.,cache=")


@pytest.mark.parametrize(
    ("printed", "flavour"),
    [
        (
            "virtiofsd version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright (c) 2003-2022 Fabrice Bellard",
            Flavour.C,
        ),
        ("virtiofsd 1.10.0\n", Flavour.RUST),
        ("virtiofsd backend 1.4.0\n", Flavour.RUST),
    ],
)
def test_the_version_tells_which_it_is(printed: str, flavour: Flavour) -> None:
    assert flavour_of(printed) is flavour


@pytest.mark.parametrize(
    ("version", "flavour"), [("virtiofsd 1.10.0", Flavour.RUST), ("virtiofsd version 7.2", Flavour.C)]
)
async def test_a_program_is_asked(tmp_path: Path, version: str, flavour: Flavour) -> None:
    program = tmp_path / "virtiofsd"
    program.write_text(f"#!/bin/sh\necho '{version}'\n")
    program.chmod(0o755)
    assert await ask_flavour(program) is flavour


async def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(HypervisorError, match="no-such: No such file"):
        await ask_flavour(tmp_path / "no-such")


async def test_its_death_is_told_with_its_last_words(tmp_path: Path) -> None:
    program = tmp_path / "virtiofsd"
    program.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no such share" >&2; exit 3; }\n')
    program.chmod(0o755)
    config = SharedFSConfig(daemon=program)
    async with virtiofsd(config, tmp_path, tmp_path / "socket") as share:
        cause = await share.wait_dead()
    assert "exited with status 3: no such share" in cause
