"""Where VMs come from. A sandbox takes one from a factory and never asks how it came to be."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from vc.hypervisor.base import VMConfig
from vc.vm import VM


class Factory(Protocol):
    """Hands out VMs."""

    def vm(
        self, config: VMConfig, *, vmid: str, netns: str | None, shared_dir: Path | None
    ) -> AbstractAsyncContextManager[VM]:
        """Give a VM whose agent serves, as long as the block lasts; its processes are named by `vmid`."""
