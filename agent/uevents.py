"""Kernel events: what has appeared in the guest, and waiting for it.

The kernel sends each event as a message on a netlink socket: "add@/devices/...", then KEY=value strings,
all ended by NUL. Whoever waits looks at sysfs when any event arrives, so that no event has to be understood
to be of use, and none can be missed between looking and waiting.
"""

from __future__ import annotations

import _socket
import os
import select
import time
from typing import TYPE_CHECKING, TypeVar

from agent.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

NETLINK_KOBJECT_UEVENT = 15  # linux/netlink.h
KERNEL_GROUP = 1  # the kernel's own events; lib/kobject_uevent.c
SO_RCVBUFFORCE = 33  # asm-generic/socket.h

# Seconds to wait for a device: Kata's default of `agent.hotplug_timeout`.
hotplug_timeout = 3.0


def open_socket() -> _socket.socket:
    """Listen to the kernel's events."""
    listener = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_DGRAM, NETLINK_KOBJECT_UEVENT)
    listener.setsockopt(_socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 20)
    listener.bind((0, KERNEL_GROUP))
    return listener


def parse(message: bytes) -> dict[str, str]:
    """Return the fields of an event; ACTION and DEVPATH are always among them. Nothing for what is no
    event.
    """
    head, *strings = message.rstrip(b"\0").split(b"\0")
    action, separator, path = head.decode("utf-8", "replace").partition("@")
    if not separator:
        return {}
    fields = {"ACTION": action, "DEVPATH": path}
    for string in strings:
        key, separator, value = string.decode("utf-8", "replace").partition("=")
        if separator:
            fields[key] = value
    return fields


def wait_for(look: Callable[[], T | None], what: str, timeout: float | None = None) -> T:
    """Look again after each event until `look` returns something that is true; returns that.

    Raises:
        NotFound: it did not come in time.
    """
    found = look()
    if found:
        return found
    deadline = time.monotonic() + (hotplug_timeout if timeout is None else timeout)
    listener = open_socket()
    try:
        while True:
            found = look()
            if found:
                return found
            left = deadline - time.monotonic()
            if left <= 0:
                raise NotFound(f"{what} has not appeared within {timeout or hotplug_timeout} s")
            # A node in /dev comes after its event, if something other than the kernel makes it: look now
            # and then.
            if select.select([listener], [], [], min(left, 0.1))[0]:
                listener.recv(65536)
    finally:
        listener.close()


def exists(path: str) -> Callable[[], bool]:
    """Return a look at whether a path is there."""
    return lambda: os.path.exists(path)
