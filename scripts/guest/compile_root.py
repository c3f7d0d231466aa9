"""Run by the guest's Python: turn every source below the given directories of a root into bytecode beside it.

The sources go: importing then needs no second look for a newer source, and the image gets smaller. Bytecode
is of the unchecked kind (PEP 552): it holds no time, and the import system never asks for the source.
"""

import os
import py_compile
import sys


def main() -> None:
    root, *directories = sys.argv[1:]
    for directory in directories:
        for where, names, files in os.walk(os.path.join(root, directory)):  # noqa: PTH118 (pathlib is not needed)
            names.sort()
            for name in sorted(files):
                if name.endswith(".py"):
                    path = os.path.join(where, name)  # noqa: PTH118
                    py_compile.compile(
                        path,
                        cfile=path + "c",
                        dfile=path.removeprefix(root),
                        doraise=True,
                        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
                    )
                    os.unlink(path)  # noqa: PTH108


main()
