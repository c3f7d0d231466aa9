"""The factory that boots each VM when it is wanted."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

from vc.hypervisor.base import VMConfig
from vc.vm import VM, boot_vm


class DirectFactory:
    """Boots. See `vc.factory.Factory`."""

    def vm(
        self, config: VMConfig, *, vmid: str, netns: str | None, shared_dir: Path | None
    ) -> AbstractAsyncContextManager[VM]:
        """Boot a VM."""
        return boot_vm(config, vmid=vmid, netns=netns, shared_dir=shared_dir)
