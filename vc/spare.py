"""Descriptors that are kept back: a process that has run out of them must still be able to clean up.

To remove a directory takes two, to read which mounts there are takes one. The rule: enter it right behind the
block whose end cleans up, as in `async with AsyncExitStack() as stack, spare_descriptors():`, so that it is
left first.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

COUNT = 3  # shutil.rmtree: the directory, its listing; and the one below it


@asynccontextmanager
async def spare_descriptors() -> AsyncIterator[None]:
    """Hold some descriptors for the length of the block. Raises: OSError, if there are not even these."""
    with ExitStack() as held:
        for _ in range(COUNT):
            held.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        yield
