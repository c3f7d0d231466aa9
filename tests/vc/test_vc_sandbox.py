"""What a sandbox refuses before there is anything of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vc.config import Config, HypervisorConfig, RuntimeConfig
from vc.errors import Unsupported
from vc.sandbox import SandboxSpec, open_sandbox


async def test_a_pod_whose_files_could_not_reach_the_guest_is_refused_before_anything_is_made(
    tmp_path: Path,
) -> None:
    """It booted, and failed when the guest looked for a share that nobody had plugged."""
    run_dir = tmp_path / "vc"
    hypervisor = HypervisorConfig(image=Path("/i"), shared_fs="none")
    config = Config(tmp_path / "c.toml", hypervisor, runtime=RuntimeConfig(run_dir=run_dir))
    with pytest.raises(Unsupported, match='shared_fs = "none"'):
        async with open_sandbox(SandboxSpec("ns--a"), config):
            pass
    assert not run_dir.exists()
