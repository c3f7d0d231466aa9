"""A real shim process whose guest is played by the test; see tests/harness/hostile.py."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import trio

from tests.harness.hostile import RATE, VMM, Host
from tests.harness.shim_process import ShimProcess, serving

HERE = Path(__file__).parent
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
PATIENT, IMPATIENT = 40, 6  # seconds of that clock until a guest must have answered
CONFIG = """
[hypervisor.qemu]
path = "{vmm}"
kernel = "{vmm}"
image = "{vmm}"
accelerator = "tcg"
rootless = false
virtio_fs_daemon = "{virtiofsd}"
[agent.kata]
dial_timeout = {dial_timeout}
[runtime]
run_dir = "{directory}/vc"
create_container_timeout = 10
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="module")
def vmm(tmp_path_factory: pytest.TempPathFactory) -> VMM:
    if os.geteuid() != 0:
        pytest.skip("needs root: the shim mounts")
    missing = [str(name) for name in (VIRTIOFSD, "setpriv", "unshare") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return VMM(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def host(vmm: VMM) -> Iterator[Host]:
    numbers = itertools.count()

    def serve() -> AbstractContextManager[ShimProcess]:
        directory = vmm.path.parent / f"shim-{next(numbers)}"
        directory.mkdir()
        fields = {"vmm": vmm.path, "virtiofsd": VIRTIOFSD, "directory": directory}
        (directory / "impatient.toml").write_text(CONFIG.format(**fields, dial_timeout=IMPATIENT))
        return serving(directory, CONFIG.format(**fields, dial_timeout=PATIENT), rate=RATE)

    host = Host(vmm, serve)
    trio.run(host.live_once)  # what a shim imports and keeps is not to be counted
    yield host
    host.close()
