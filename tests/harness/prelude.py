"""A shim that does something before it begins: gives itself limits, joins a group, sees another socket."""

import shlex
import shutil
from pathlib import Path

from tests.harness.runtimes import search_path

NAME = "containerd-shim-kata-v2"


class Prelude:
    """A directory to put in front of PATH. Its shim runs a line of shell first, when it is to `start`.

    The line sees the shim's arguments; the real program is `shim`.
    """

    def __init__(self, directory: Path, *, beside: Path | None = None) -> None:
        """Make the directory, with the programs in `beside` as well."""
        real = shutil.which(NAME, path=search_path())
        assert real is not None, search_path()
        self.directory = directory
        self.shim = real
        self._line = directory / "prelude.sh"
        directory.mkdir()
        for program in beside.iterdir() if beside is not None else ():
            (directory / program.name).symlink_to(program)
        self.line("")
        script = (
            f'#!/bin/sh\nfor last; do :; done\n[ "$last" != start ] || . {shlex.quote(str(self._line))}\n'
        )
        program = directory / NAME
        program.write_text(f'{script}exec {shlex.quote(real)} "$@"\n')
        program.chmod(0o755)

    def line(self, text: str) -> None:
        """Have the next shims do this."""
        self._line.write_text(text + "\n")
