"""The factory that boots each VM when it is wanted."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

from vc.beginning import Boot
from vc.hypervisor.base import VMConfig
from vc.vm import VM, boot_vm


class DirectFactory:
    """Boots. See `vc.factory.Factory`."""

    def __init__(self, *, kept: bool = False) -> None:
        """A VM that is `kept` can be parked."""
        self._kept = kept

    def vm(
        self, config: VMConfig, *, vmid: str, netns: str | None, shared_dir: Path | None
    ) -> AbstractAsyncContextManager[VM]:
        """Boot a VM."""
        beginning = Boot(kept=self._kept)
        return boot_vm(config, vmid=vmid, netns=netns, shared_dir=shared_dir, beginning=beginning)
