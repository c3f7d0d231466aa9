"""Kernel modules, loaded when something turns out to need one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from agent import log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.reaper import Reaper

MODPROBE = "/sbin/modprobe"

reaper: Reaper | None = None  # set at start-up; without one, nothing is loaded (a host's kernel is not ours)


def load(name: str, parameters: Sequence[str] = ()) -> bool:
    """Load a module; returns whether it was found."""
    if reaper is None or not os.path.exists(MODPROBE):
        return False
    status, output = reaper.run([MODPROBE, name, *parameters], check=False)
    if status:
        log.debug("no such module", module=name, text=output.decode("utf-8", "replace").strip())
    return not status
