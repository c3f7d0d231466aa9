"""`kata-runtime leaks` beside real sandboxes: nothing of a live one is named, everything of a dead one is."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeContainerd
from tests.e2e.test_e2e_crashes import shim_of, wait_until
from tests.harness.containerd import Containerd
from tests.harness.leaks import shim_socket
from tests.harness.processes import kill, read_process
from vc.cleanup import processes_of
from vc.storage.mounts import bind


def run(containerd: Containerd, *flags: str) -> tuple[int, list[str]]:
    """Run the command; return its exit status, and its lines without their explanations."""
    done = subprocess.run(
        ["kata-runtime", "leaks", "--run-dir", str(containerd.runtime.run_dir), *flags],
        env=containerd.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    return done.returncode, [
        line.partition(": ")[0] for line in lines if not line.startswith("nothing is left")
    ]


def test_a_sandbox_is_named_when_it_is_dead_and_not_before(make_containerd: MakeContainerd) -> None:
    with make_containerd() as daemon:
        if daemon.runtime.run_dir is None:
            pytest.skip(f"{daemon.runtime.name} keeps no sandboxes of its own")
        with daemon.running() as container:
            sandbox = daemon.runtime.run_dir / "sbs" / f"{daemon.namespace}--{container}"
            record = sandbox / "persist.json"
            vmid = json.loads(record.read_text())["vmid"]
            assert run(daemon) == (0, [])
            # Even without its record: the VM's directory has a lock of its own.
            record.rename(record.with_suffix(".away"))
            assert run(daemon) == (0, [])
            assert run(daemon, "--fix") == (0, [])
            record.with_suffix(".away").rename(record)
            assert daemon.exec(container, "echo", "alive").stdout == b"alive\n"

            shim = shim_of(daemon, container)
            socket = shim_socket(daemon, container)
            daemon.stop_daemon()  # or it would clean up
            kill(shim)
            wait_until(lambda: read_process(shim.pid) is None and not processes_of(vmid))
            _check_tool(daemon, sandbox, vmid, socket)
            daemon.start_daemon()
        assert daemon.run("echo", "new").stdout == b"new\n"
        assert run(daemon) == (0, [])


def _check_tool(daemon: Containerd, sandbox: Path, vmid: str, socket: Path) -> None:
    """The shim's mounts and the VM's processes died with it; plant such ones that did not."""
    target = sandbox / "mounts" / "planted"
    target.mkdir()
    bind(daemon.directory / "tmp", target)
    pipe = subprocess.PIPE
    argv = ["sh", "-c", "echo; read line", "vmm", "-name", f"sandbox-{vmid},debug-threads=on"]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        process.stdout.readline()
        vm = sandbox.parent.parent / "vm" / vmid
        for directory in (sandbox, vm):
            os.utime(directory, (0, 0))  # what is as young as these counts as alive
        things = [
            f"process {process.pid}",
            f"mount {target}",
            f"socket {socket}",
            f"directory {sandbox}",
            f"directory {vm}",
        ]
        status, lines = run(daemon)
        assert (status, sorted(lines)) == (1, sorted(things))
        assert run(daemon) == (1, lines)  # looking changes nothing
        status, lines = run(daemon, "--fix")
        assert (status, sorted(lines)) == (0, sorted(f"removed {thing}" for thing in things))
        assert process.wait() == -9
    assert run(daemon) == (0, [])
    assert list(sandbox.parent.parent.glob("*/*")) == []
