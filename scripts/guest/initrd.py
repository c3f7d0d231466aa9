"""The initrd: init, and the modules without which the root cannot be mounted.

It only finds the root (the first virtio-blk disk, an EROFS image), moves there and starts /sbin/init.
Nothing waits: each module's probe has created its devices when finit_module returns.
"""

from __future__ import annotations

from collections.abc import Sequence

from guest.initprogram import (
    SYS_CHDIR,
    SYS_CHROOT,
    SYS_CLOSE,
    SYS_CLOSE_RANGE,
    SYS_DUP2,
    SYS_EXECVE,
    SYS_FINIT_MODULE,
    SYS_MOUNT,
    SYS_OPEN,
    SYS_UNLINK,
    Call,
    Operand,
    assemble,
)
from guest.kernel import Module, stripped
from guest.tree import Tree

# include/uapi/linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_MOVE = 1, 2, 4, 8192
O_RDONLY, O_RDWR = 0, 2  # include/uapi/asm-generic/fcntl.h
ROOT_DEVICE = "/dev/vda"
ROOT_TYPE = "erofs"
INIT = "/sbin/init"


def initrd_tree(modules: Sequence[Module], boot_modules: Sequence[str]) -> Tree:
    """Lay out the initrd; `boot_modules` are absolute paths in the root."""
    tree = Tree()
    tree.directory("dev")
    tree.directory("root")
    # Where the kernel's own messages about a missing root end up before devtmpfs is there.
    tree.character_device("dev/console", 5, 1, 0o600)
    for module in modules:
        tree.file(f"modules/{module.name}.ko", stripped(module.data))
    tree.file("init", assemble(init_calls([module.name for module in modules], boot_modules)), 0o755)
    return tree


def init_calls(modules: Sequence[str], boot_modules: Sequence[str]) -> list[Call]:
    """Say what init does, in order."""
    calls = [
        Call(
            SYS_MOUNT,
            ("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755"),
            "cannot mount devtmpfs on /dev",
        )
    ]
    for name in modules:
        path = f"/modules/{name}.ko"
        calls += [
            *_load(path),
            Call(SYS_UNLINK, (path,)),
        ]  # an initrd's files stay in memory until they are unlinked
    calls += [
        # The kernel could not open a console whose driver was a module; virtio_console is loaded now.
        Call(SYS_OPEN, ("/dev/console", O_RDWR), save=True),
        *(Call(SYS_DUP2, (Operand.SAVED, descriptor)) for descriptor in (0, 1, 2)),
        Call(
            SYS_MOUNT,
            (ROOT_DEVICE, "/root", ROOT_TYPE, MS_RDONLY | MS_NODEV, 0),
            f"cannot mount {ROOT_DEVICE} as {ROOT_TYPE}: is the image the first virtio-blk disk?",
        ),
        Call(SYS_MOUNT, ("/dev", "/root/dev", 0, MS_MOVE, 0), "cannot move /dev into the root"),
        Call(SYS_CHDIR, ("/root",), "cannot enter the root"),
        Call(SYS_MOUNT, (".", "/", 0, MS_MOVE, 0), "cannot move the root to /"),
        Call(SYS_CHROOT, (".",), "cannot chroot into the root"),
        Call(SYS_CHDIR, ("/",), "cannot enter /"),
    ]
    for path in boot_modules:
        calls += _load(path)
    calls += [
        Call(SYS_CLOSE_RANGE, (3, 0xFFFFFFFF, 0)),
        Call(SYS_EXECVE, (INIT, Operand.ARGV, Operand.ENVP), f"cannot start {INIT}"),
    ]
    return calls


def _load(path: str) -> list[Call]:
    return [
        Call(SYS_OPEN, (path, O_RDONLY), f"cannot open {path}", save=True),
        Call(SYS_FINIT_MODULE, (Operand.SAVED, "", 0), f"cannot load {path}"),
        Call(SYS_CLOSE, (Operand.SAVED,)),
    ]
