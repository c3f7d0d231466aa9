"""A container plants in its own files what could lead the host out of them when it removes the container."""

from __future__ import annotations

import os
from pathlib import Path

from tests.e2e.conftest import NoLeaks
from tests.harness.containerd import Containerd

# $1 is a directory of the host that the container has no business with; the guest has none of that name.
PLANT = r"""
plant() {
    ln -s "$1/secret" link; ln -s "$1" directory; ln -s "../../../../../../../../../..$1" relative
    mkfifo fifo; mknod block b 8 0; mknod char c 1 3; : >'new
line'
    deep=d/d/d/d/d/d/d/d/d/d; deep=$deep/$deep/$deep/$deep/$deep; mkdir -p $deep/$deep/$deep/$deep
    mkdir -p real/sub; mv real moved; ln -s "$1" real
    cat link directory/secret relative/secret real/secret 2>/dev/null && echo "has read the host's file"
    touch directory/planted relative/planted 2>/dev/null && echo "has written beside the host's file"
    rm -rf directory/* relative/* real/*
}
cd /volume && plant "$1"
mkdir /planted && cd /planted && plant "$1"
cd / && for name in mnt media opt srv var home root; do rm -rf /$name; ln -s "$1" /$name; done
echo planted
"""


def describe(directory: Path) -> list[tuple[str, int, int, int]]:
    """Return all that can change about the files of a directory."""
    paths = [directory, *sorted(directory.rglob("*"))]
    return [(str(p), (s := p.lstat()).st_mode, s.st_mtime_ns, s.st_size) for p in paths]


def test_what_a_container_plants_in_its_files_leads_the_host_nowhere(
    containerd: Containerd, no_leaks: NoLeaks
) -> None:
    place, volume = containerd.directory / "place", containerd.directory / "planted"
    (place / "deep").mkdir(parents=True)
    (place / "secret").write_text("the host's\n")
    volume.mkdir()
    before = describe(place)
    mount = f"type=bind,src={volume},dst=/volume,options=rbind:rw"
    with no_leaks():
        result = containerd.run("sh", "-c", PLANT, "sh", str(place), flags=["--privileged", "--mount", mount])
    assert result.stdout == b"planted\n", result
    assert describe(place) == before
    assert os.readlink(volume / "directory") == str(place)  # noqa: PTH115 - the guest's words as they are
    assert (volume / "fifo").is_fifo() and (volume / "moved/sub").is_dir()
