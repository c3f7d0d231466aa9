"""Real VMs without a containerd: their configuration, programs in their guests, and what they leave."""

import os
import secrets
import threading
from pathlib import Path
from typing import Any

from protos.kata import agent_pb2
from tests.harness.runtimes import ROOT
from vc.hypervisor.base import SharedFSConfig, VMConfig
from vc.oci.mounts import Mount
from vc.oci.translate import guest_spec
from vc.storage.share import GUEST_SHARE
from vc.vm import VM

GUEST = Path(os.environ.get("KATA_TEST_GUEST", ROOT / "build" / "guest"))
QEMU = Path("/usr/bin/qemu-system-x86_64")
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
TAG = "kataShared"
LIMIT = 60  # seconds; what hangs is to fail and not to hang the tests
READ_SIZE = 65536  # bytes


def missing() -> str:
    """Say what a VM needs and this machine has not; empty if it has everything."""
    if os.geteuid() != 0:
        return "needs root"
    for thing in (QEMU, VIRTIOFSD, GUEST / "guest.json"):
        if not thing.exists():
            return f"{thing} is missing"
    return ""


def small_vm(run_dir: Path) -> VMConfig:
    """Return a small VM with the guest that was built, a share, and room for more."""
    return VMConfig(
        qemu=QEMU,
        kernel=next(GUEST.glob("vmlinu*")),
        initrd=GUEST / "initrd.img",
        image=GUEST / "rootfs.erofs",
        rootfs_type="erofs",
        memory_mib=256,
        max_vcpus=2,
        memory_slots=2,
        max_memory_mib=1024,
        accelerator="tcg",
        shared_fs=SharedFSConfig(daemon=VIRTIOFSD),
        run_dir=run_dir,
        dial_timeout=LIMIT,
    )


class Traces:
    """What a VM leaves on the host: to be nothing once its block has ended."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.vmid = secrets.token_hex(8)
        self.threads = self._threads()
        self.descriptors = self._descriptors()

    def _threads(self) -> set[str]:
        # trio keeps idle worker threads for a while
        return {thread.name for thread in threading.enumerate() if not thread.name.startswith("Trio thread")}

    def _descriptors(self) -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def processes(self) -> dict[int, str]:
        """Return the command lines of the VM's processes, by their ids."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if self.vmid.encode() in command:
                found[int(entry.name)] = command.replace(b"\0", b" ").decode()
        return found

    def assert_none(self) -> None:
        assert self.processes() == {}
        assert not list(self.run_dir.glob("vm/*"))
        assert self._threads() <= self.threads
        assert self._descriptors() <= self.descriptors


async def prepare_guest(vm: VM, hostname: str = "guest", *, share: bool = True) -> None:
    """Name the guest and mount what it shares, as a sandbox does."""
    storage = agent_pb2.Storage(
        driver="virtio-fs", source=TAG, fstype="virtiofs", mount_point=f"{GUEST_SHARE}/"
    )
    request = agent_pb2.CreateSandboxRequest(
        hostname=hostname, sandbox_id=hostname, storages=[storage] if share else []
    )
    await vm.agent.create_sandbox(request)


async def run_in_guest(vm: VM, *argv: str, share: str = "") -> str:
    """Run one of the guest's own programs with all rights; return what it prints, its errors as well.

    It sees the guest's files, the directory `share` of what is shared at /mnt, the guest's own /proc at /srv.
    """
    name = f"probe-{secrets.token_hex(4)}"
    root = f"/run/kata-containers/{name}"
    mounts = [
        Mount("/proc", "proc", "proc", ()),
        Mount("/sys", "sysfs", "sysfs", ("ro",)),
        Mount("/dev", "devtmpfs", "devtmpfs", ()),
        Mount("/srv", "/proc", "bind", ("rbind",)),
    ]
    if share:
        mounts.append(Mount("/mnt", f"{GUEST_SHARE}/{share}", "bind", ("rbind",)))
    rights = ["CAP_NET_RAW", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE", "CAP_SYS_PTRACE"]
    spec: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/busybox", "sh", "-c", 'exec "$@" 2>&1', "sh", *argv],
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), rights),
        },
        "root": {"path": "rootfs", "readonly": True},
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "mount"}],
            "cgroupsPath": f"/{name}",
            "resources": {"devices": [{"allow": True, "access": "rwm"}]},
        },
    }
    request = agent_pb2.CreateContainerRequest(
        container_id=name,
        exec_id=name,
        storages=[
            agent_pb2.Storage(
                driver="bind", source="/", fstype="bind", mount_point=root, options=["bind", "ro"]
            )
        ],
        OCI=guest_spec(spec, root_path=root, mounts=mounts, seccomp=False).spec,
        stdout_port=vm.agent.new_port(),
        stderr_port=vm.agent.new_port(),
        stdin_port=vm.agent.new_port(),
    )
    await vm.agent.create_container(request, timeout=LIMIT)
    try:
        streams = [
            await vm.agent.dial(port)
            for port in (request.stdin_port, request.stdout_port, request.stderr_port)
        ]
        await vm.agent.start_container(name)
        printed = b""
        while data := await streams[1].receive_some(READ_SIZE):
            printed += data
        status = (await vm.agent.wait_process(name, name)).status
        for stream in streams:
            await stream.aclose()
    finally:
        await vm.agent.remove_container(name)
    assert status == 0, printed
    return printed.decode()
