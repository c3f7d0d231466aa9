"""A run directory with what killed shims, servers and makers leave behind, each planted as they leave it."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

from shim.address import socket_path
from vc import leaks
from vc.factory.handover import handover_path
from vc.leaks import Kind, Leak
from vc.persist import store
from vc.persist.schema import SandboxRecord
from vc.persist.store import Layout, SandboxLock
from vc.storage.mounts import bind, unmount_below
from vc.unixsock import listen

SANDBOX = "default--c1"
VMID = "00112233445566aa"
CONTAINERD = "/run/test/containerd.sock"


class Host:
    """A run directory, and whatever a test puts into it and beside it."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.run_dir = directory / "vc"
        self.layout = Layout(self.run_dir)
        self.shim_sockets = directory / "s"
        self.shim_sockets.mkdir()
        self.templates = directory / "template"
        self.cache_socket = directory / "cache.sock"
        self.stack = stack
        stack.callback(unmount_below, self.run_dir)

    def find(self) -> list[Leak]:
        return leaks.find(
            self.run_dir,
            containerd=CONTAINERD,
            shim_sockets=self.shim_sockets,
            templates=self.templates,
            cache_socket=self.cache_socket,
        )

    def found(self) -> set[tuple[Kind, str]]:
        return {(leak.kind, leak.name) for leak in self.find()}

    def sandbox(self, sandbox_id: str = SANDBOX, vmid: str = VMID) -> Path:
        """Leave a sandbox's directory and record, as a killed shim does."""
        lock = store.claim(self.layout, sandbox_id)
        store.save(self.layout, SandboxRecord(sandbox_id, vmid, 1, 2, "/x.toml", 3.0))
        lock.release()
        return self.aged(self.layout.sandbox(sandbox_id))

    def vm(self, vmid: str = VMID) -> Path:
        directory = self.layout.vm(vmid)
        directory.mkdir(mode=0o700, parents=True)
        self.socket(directory / "qmp.sock")
        return self.aged(directory)

    def aged(self, directory: Path) -> Path:
        os.utime(directory, (0, 0))
        return directory

    def process(self, *words: str) -> subprocess.Popen[bytes]:
        """Run something with `words` in its command line. It waits for its standard input's end."""
        pipe = subprocess.PIPE
        process = subprocess.Popen(["sh", "-c", "echo; read line", "vmm", *words], stdin=pipe, stdout=pipe)

        def end() -> None:
            process.kill()
            process.communicate()

        self.stack.callback(end)
        assert process.stdout is not None
        process.stdout.readline()  # Popen returns before the kernel shows the new command line
        return process

    def mount(self, directory: Path) -> Path:
        target = directory / "mounted"
        target.mkdir()
        bind(self.shim_sockets, target)
        self.aged(directory)
        return target

    def socket(self, path: Path) -> Path:
        """Leave a socket on which nobody listens any more."""
        listen(path).close()
        return path

    def half_a_template(self) -> Path:
        """Leave what a maker of a template leaves when it is killed."""
        directory = self.templates / "tmp-0123"
        (directory / "run" / "vm" / VMID).mkdir(mode=0o700, parents=True)
        self.templates.chmod(0o700)
        (directory / "memory").write_bytes(b"memory")
        self.aged(self.templates)
        return self.aged(directory)

    def shim_socket(self, name: str) -> Path:
        """Return where the shim of a sandbox would listen, by its own reckoning."""
        return self.shim_sockets / Path(socket_path(CONTAINERD, "default", name)).name

    def lock(self, directory: Path) -> SandboxLock:
        lock = SandboxLock(directory)
        assert lock.acquire_nowait()
        self.stack.callback(lock.release)
        self.aged(directory)
        return lock


def vmm_words(vmid: str = VMID) -> tuple[str, str]:
    return "-name", f"sandbox-{vmid},debug-threads=on"


def plant_process_of_a_record(host: Host) -> tuple[Kind, str]:
    host.sandbox()
    return Kind.PROCESS, str(host.process(*vmm_words()).pid)


def plant_process_of_a_vm_directory(host: Host) -> tuple[Kind, str]:
    host.vm()
    return Kind.PROCESS, str(host.process(*vmm_words()).pid)


def plant_process_whose_directory_is_gone(host: Host) -> tuple[Kind, str]:
    source = host.layout.vm(VMID) / "shared"
    return Kind.PROCESS, str(host.process("-o", f"source={source}/.,cache=auto").pid)


def plant_mount_of_a_sandbox(host: Host) -> tuple[Kind, str]:
    return Kind.MOUNT, str(host.mount(host.sandbox()))


def plant_mount_of_a_vm(host: Host) -> tuple[Kind, str]:
    return Kind.MOUNT, str(host.mount(host.vm()))


def plant_socket_without_a_directory(host: Host) -> tuple[Kind, str]:
    host.layout.vms.mkdir(parents=True)
    return Kind.SOCKET, str(host.socket(host.layout.vms / "qmp.sock"))


def plant_socket_of_a_shim(host: Host) -> tuple[Kind, str]:
    host.sandbox()
    path = host.shim_socket("c1")
    return Kind.SOCKET, str(host.socket(path))


def plant_file(host: Host) -> tuple[Kind, str]:
    host.layout.sandboxes.mkdir(parents=True, exist_ok=True)
    path = host.layout.sandboxes / "x.tmp"
    path.touch()
    return Kind.FILE, str(path)


def plant_sandbox(host: Host) -> tuple[Kind, str]:
    return Kind.DIRECTORY, str(host.sandbox())


def plant_sandbox_without_a_record(host: Host) -> tuple[Kind, str]:
    directory = host.sandbox()
    (directory / store.RECORD).write_text("{")
    return Kind.DIRECTORY, str(host.aged(directory))


def plant_vm(host: Host) -> tuple[Kind, str]:
    return Kind.DIRECTORY, str(host.vm())


def plant_half_a_template(host: Host) -> tuple[Kind, str]:
    return Kind.TEMPLATE, str(host.half_a_template())


def plant_process_of_a_template(host: Host) -> tuple[Kind, str]:
    host.half_a_template()
    return Kind.PROCESS, str(host.process(*vmm_words()).pid)


def plant_socket_of_a_cache(host: Host) -> tuple[Kind, str]:
    return Kind.SOCKET, str(host.socket(host.cache_socket))


def plant_socket_at_which_a_cache_handed_over(host: Host) -> tuple[Kind, str]:
    return Kind.SOCKET, str(host.socket(handover_path(host.cache_socket)))
