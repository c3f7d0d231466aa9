"""The network of the guest, as the host wants it: links, addresses, routes, neighbours.

`agent.netlink` has the messages; here they are sent, in the order that the kernel accepts.
"""

from __future__ import annotations

import _socket
import errno
import os
from typing import TYPE_CHECKING

from agent import log, netlink, schema
from agent.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent.netlink import Message
    from agent.schema import agent as messages
    from agent.schema import types

NETLINK_ROUTE = 0  # linux/netlink.h
RECEIVE_SIZE = 1 << 16  # the kernel makes datagrams of at most 32 KiB for a reader like this
MAX_NAME = 15  # linux/if.h, IFNAMSIZ - 1
V6 = 1  # types.IPFamily.v6
SCOPE_LINK_V6 = b"\xfe\x80"


class Link:
    """A network interface, as the kernel has it."""

    __slots__ = ("flags", "index", "kind", "mac", "mtu", "name", "stats")

    def __init__(self, message: Message) -> None:
        _, self.kind, self.index, self.flags, _ = message.fields
        found = message.attributes
        self.name = found.get(netlink.IFLA_IFNAME, b"").rstrip(b"\0").decode("utf-8", "replace")
        self.mac = netlink.format_mac(found.get(netlink.IFLA_ADDRESS, b""))
        self.mtu = int.from_bytes(found.get(netlink.IFLA_MTU, b""), "little")
        self.stats = found.get(netlink.IFLA_STATS64, b"")


class Kernel:
    """A conversation with the kernel. Use it in a `with` block."""

    def __init__(self) -> None:
        self._socket = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW, NETLINK_ROUTE)
        self._sequence = 0

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def request(self, kind: int, body: bytes, flags: int = 0) -> list[Message]:
        """Make a request and return the answer.

        Raises:
            NetlinkError: the kernel refuses.
        """
        self._sequence += 1
        flags |= 0 if flags & netlink.DUMP == netlink.DUMP else netlink.ACK
        self._socket.sendto(netlink.encode(kind, flags, self._sequence, body), (0, 0))
        answer: list[Message] = []
        while True:
            for message in netlink.parse(self._socket.recv(RECEIVE_SIZE), self._sequence):
                if message is None:
                    return answer
                answer.append(message)

    def links(self) -> list[Link]:
        """Return all links."""
        body = netlink.LINK.pack(netlink.AF_UNSPEC, 0, 0, 0, 0)
        return [Link(message) for message in self.request(netlink.GETLINK, body, netlink.DUMP)]

    def link(self, name: str) -> Link:
        """Return the link with this name.

        Raises:
            NotFound: there is none.
        """
        for link in self.links():
            if link.name == name:
                return link
        raise NotFound(f"Link not found (name: {name})")

    def addresses(self) -> list[Message]:
        """Return all addresses."""
        return self.request(netlink.GETADDR, netlink.ADDRESS.pack(0, 0, 0, 0, 0), netlink.DUMP)

    def routes(self, family: int) -> list[Message]:
        """Return the routes of one family."""
        return self.request(
            netlink.GETROUTE, netlink.ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0), netlink.DUMP
        )


# Text and bytes


def parse_address(text: str) -> tuple[int, bytes]:
    """Parse an IP address: its family and bytes.

    Raises:
        InvalidArgument: it is none.
    """
    family = netlink.AF_INET6 if ":" in text else netlink.AF_INET
    try:
        return family, _socket.inet_pton(family, text)
    except (OSError, ValueError):  # a NUL in it
        raise InvalidArgument(f'"{text}" is no IP address') from None


def parse_network(text: str, family: int) -> tuple[bytes, int]:
    """Parse "10.0.0.0/8"; nothing and "default" mean everything."""
    if text in ("", "default"):
        return b"", 0
    address, _, prefix = text.partition("/")
    found, value = parse_address(address)
    length = len(value) * 8 if not prefix else _prefix(prefix, value)
    if found != family:
        raise InvalidArgument(f'route to "{text}" is of another family than it says')
    return (value, length)


def _prefix(text: str, value: bytes) -> int:
    # Other alphabets' digits, and more of them than int() takes, are no number here.
    if not (text.isascii() and text.isdigit()) or len(text) > 3 or int(text) > len(value) * 8:
        raise InvalidArgument(f'"{text}" is no prefix length of an address of {len(value)} bytes')
    return int(text)


def _format(family: int, value: bytes) -> str:
    return _socket.inet_ntop(family, value)


def _family(number: int) -> types.IPFamily:
    return schema.types.v6 if number == netlink.AF_INET6 else schema.types.v4


def _mac(text: str) -> bytes:
    try:
        return netlink.parse_mac(text)
    except ValueError:
        raise InvalidArgument(f'"{text}" is no hardware address') from None


# Interfaces


def update_interface(wanted: types.Interface) -> types.Interface:
    """Make a link what the host wants; returns it. A link is found by its hardware address, else by its
    name.
    """
    if len(wanted.name) > MAX_NAME:
        raise InvalidArgument(f'"{wanted.name}" is too long for an interface: {MAX_NAME} characters fit')
    if wanted.devicePath:
        _wait_for_device(wanted.devicePath)
    with Kernel() as kernel:
        link = _find(kernel, wanted)
        kernel.request(netlink.SETLINK, netlink.set_link(link.index, change=netlink.IFF_UP))
        if wanted.hwAddr and link.mac != wanted.hwAddr.lower():
            kernel.request(netlink.SETLINK, netlink.set_link(link.index, mac=_mac(wanted.hwAddr)))
        if wanted.name and link.name != wanted.name:
            _make_way(kernel, wanted.name)
            kernel.request(netlink.SETLINK, netlink.set_link(link.index, rename=wanted.name))
        _set_addresses(kernel, link.index, wanted.IPAddresses)
        flags = netlink.IFF_UP | (wanted.raw_flags & netlink.IFF_NOARP)
        change = netlink.IFF_UP | netlink.IFF_NOARP
        kernel.request(
            netlink.SETLINK, netlink.set_link(link.index, flags=flags, change=change, mtu=wanted.mtu)
        )
        # Adding addresses to a link that is down loses IPv6 ones, and "up" may bring new ones: so once more.
        _set_addresses(kernel, link.index, wanted.IPAddresses)
    return wanted


def _wait_for_device(path: str) -> None:
    from agent import devices, uevents

    def look() -> bool:
        try:
            directory = devices.pci_sysfs_path(path)
            return any(
                child == "net" or (child.startswith("virtio") and os.path.isdir(f"{directory}/{child}/net"))
                for child in os.listdir(directory)
            )
        except (OSError, NotFound):
            return False

    uevents.wait_for(look, f"network device at PCI path {path}")


def _find(kernel: Kernel, wanted: types.Interface) -> Link:
    links = kernel.links()
    found = [link for link in links if wanted.hwAddr and link.mac == wanted.hwAddr.lower()]
    found += [link for link in links if link.name and link.name in (wanted.name, wanted.device)]
    if not found:
        raise NotFound(f"Link not found (address: {wanted.hwAddr}, name: {wanted.name or wanted.device})")
    return found[0]


def _make_way(kernel: Kernel, name: str) -> None:
    """Rename whoever has a name that is needed for another."""
    for link in kernel.links():
        if link.name == name:
            kernel.request(netlink.SETLINK, netlink.set_link(link.index, change=netlink.IFF_UP))
            other = f"{name[: MAX_NAME - 5]}_temp"
            kernel.request(netlink.SETLINK, netlink.set_link(link.index, rename=other))


def _set_addresses(kernel: Kernel, index: int, wanted: Iterable[types.IPAddress]) -> None:
    """Give a link exactly these addresses, and leave the link-local one that the kernel makes."""
    target = {}
    for entry in wanted:
        family, value = parse_address(entry.address)
        if family == netlink.AF_INET6 and not os.path.exists("/proc/net/if_inet6"):
            log.warning("no IPv6 in this guest", address=entry.address)
            continue
        target[family, value] = _prefix(entry.mask or str(len(value) * 8), value)
    for message in kernel.addresses():
        family, prefix, _, _, owner = message.fields
        value = message.attributes.get(netlink.IFA_LOCAL) or message.attributes.get(netlink.IFA_ADDRESS, b"")
        if owner != index or value.startswith(SCOPE_LINK_V6) or target.get((family, value)) == prefix:
            continue
        kernel.request(netlink.DELADDR, netlink.address(index, family, value, prefix))
    for (family, value), prefix in target.items():
        body = netlink.address(index, family, value, prefix)
        try:
            kernel.request(netlink.NEWADDR, body, netlink.CREATE | netlink.REPLACE)
        except netlink.NetlinkError as exc:
            if exc.errno != errno.EEXIST:
                raise


def list_interfaces() -> list[types.Interface]:
    """Return all links with their addresses."""
    with Kernel() as kernel:
        links, addresses = kernel.links(), kernel.addresses()
    result = []
    for link in links:
        own = [message for message in addresses if message.fields[4] == link.index]
        result.append(
            schema.types.Interface(
                device=link.name,
                name=link.name,
                mtu=link.mtu,
                hwAddr=link.mac,
                type=netlink.LINK_TYPES.get(link.kind, ""),
                raw_flags=link.flags & netlink.IFF_NOARP,
                IPAddresses=[_describe(message) for message in own],
            )
        )
    return result


def _describe(message: Message) -> types.IPAddress:
    family, prefix, *_ = message.fields
    found = message.attributes
    value = found.get(netlink.IFA_LOCAL) or found.get(netlink.IFA_ADDRESS, b"")
    return schema.types.IPAddress(family=_family(family), address=_format(family, value), mask=str(prefix))


def statistics() -> list[messages.NetworkStats]:
    """Return the counters of all links but the loopback."""
    import struct

    with Kernel() as kernel:
        links = kernel.links()
    result = []
    for link in links:
        if link.flags & netlink.IFF_LOOPBACK or len(link.stats) < 64:
            continue
        # rtnl_link_stats64: packets, bytes, errors, dropped; each first received, then sent
        values = struct.unpack_from("=8Q", link.stats)
        kinds = ("packets", "bytes", "errors", "dropped")
        names = (f"{way}_{kind}" for kind in kinds for way in ("rx", "tx"))
        counters = dict(zip(names, values, strict=True))
        result.append(schema.agent.NetworkStats(name=link.name, **counters))
    return result


# Routes and neighbours


def update_routes(wanted: Iterable[types.Route]) -> list[types.Route]:
    """Add routes; returns all there are. Those of a link come first, for gateways must be reachable."""
    with Kernel() as kernel:
        for entry in sorted(wanted, key=lambda route: bool(route.gateway)):
            _add_route(kernel, entry)
    return list_routes()


def _add_route(kernel: Kernel, entry: types.Route) -> None:
    family = _family_of(entry)
    if family == netlink.AF_INET6 and not os.path.exists("/proc/net/if_inet6"):
        log.warning("no IPv6 in this guest", route=entry.dest)
        return
    destination, prefix = parse_network(entry.dest, family)
    body = netlink.route(
        kernel.link(entry.device).index,
        family,
        destination=destination,
        prefix=prefix,
        gateway=parse_address(entry.gateway)[1] if entry.gateway else b"",
        source=parse_address(entry.source)[1] if entry.source else b"",
        scope=entry.scope or (0 if entry.gateway or family == netlink.AF_INET6 else netlink.RT_SCOPE_LINK),
        flags=entry.flags,
        mtu=entry.mtu,
    )
    try:
        kernel.request(netlink.NEWROUTE, body, netlink.CREATE | netlink.REPLACE)
    except netlink.NetlinkError as exc:
        if exc.errno != errno.EEXIST:
            where = f"route to {entry.dest or 'default'} via {entry.gateway or entry.device}"
            raise netlink.NetlinkError(exc.errno, f"cannot add the {where}: {exc.strerror}") from exc


def _family_of(entry: types.Route) -> int:
    """Return the family of a route: older hosts do not send it."""
    texts = (entry.dest, entry.gateway, entry.source)
    v6 = entry.family == V6 or any(":" in text for text in texts)
    return netlink.AF_INET6 if v6 else netlink.AF_INET


def list_routes() -> list[types.Route]:
    """Return the routes of the main table."""
    with Kernel() as kernel:
        names = {link.index: link.name for link in kernel.links()}
        found = kernel.routes(netlink.AF_INET) + kernel.routes(netlink.AF_INET6)
    result = []
    for message in found:
        family, prefix, _, _, table, _, scope, kind, flags = message.fields
        values = message.attributes
        if table != netlink.RT_TABLE_MAIN or kind != netlink.RTN_UNICAST:
            continue
        destination = values.get(netlink.RTA_DST)
        index = int.from_bytes(values.get(netlink.RTA_OIF, b""), "little")
        result.append(
            schema.types.Route(
                dest=f"{_format(family, destination)}/{prefix}" if destination else "",
                gateway=_format(family, values[netlink.RTA_GATEWAY]) if netlink.RTA_GATEWAY in values else "",
                source=_format(family, values[netlink.RTA_PREFSRC]) if netlink.RTA_PREFSRC in values else "",
                device=names.get(index, ""),
                scope=scope,
                family=_family(family),
                flags=flags,
            )
        )
    return result


def add_neighbours(wanted: Iterable[types.ARPNeighbor]) -> None:
    """Tell the kernel which hardware address an IP address has."""
    with Kernel() as kernel:
        for entry in wanted:
            family, value = parse_address(entry.toIPAddress.address)
            body = netlink.neighbour(
                kernel.link(entry.device).index,
                family,
                value,
                _mac(entry.lladdr),
                state=entry.state,
                flags=entry.flags,
            )
            kernel.request(netlink.NEWNEIGH, body, netlink.CREATE | netlink.REPLACE)
