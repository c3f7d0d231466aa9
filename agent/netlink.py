"""rtnetlink: the messages with which Linux is told about links, addresses, routes and neighbours. Pure.

A primer. A message is a header, a fixed structure that depends on its type, and attributes:

    header      length(4) type(2) flags(2) sequence(4) port(4)      length counts the header too structure
    ifinfomsg, ifaddrmsg, rtmsg or ndmsg attribute   length(2) type(2) value, padded to 4 bytes
    length counts its own 4 bytes, not the padding

in the machine's byte order. A request has REQUEST set; with ACK the kernel answers with an ERROR message,
whose code 0 means success, else -errno. With DUMP the answer is a series of messages, marked MULTI, up to a
DONE message. Several messages may share one datagram.

Sources: linux/netlink.h, rtnetlink.h, if_link.h, if_addr.h, neighbour.h; RFC 3549.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

HEADER = struct.Struct("=IHHII")  # nlmsghdr
ATTRIBUTE = struct.Struct("=HH")  # rtattr
LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
ADDRESS = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg, in its order: see `route`
NEIGHBOUR = struct.Struct("=BxxxiHBB")  # ndmsg: family, index, state, flags, type

ERROR, DONE = 2, 3  # NLMSG_ERROR, NLMSG_DONE
REQUEST, MULTI, ACK = 1, 2, 4  # NLM_F_*
DUMP = 0x300  # NLM_F_ROOT | NLM_F_MATCH
REPLACE, EXCLUSIVE, CREATE = 0x100, 0x200, 0x400  # NLM_F_REPLACE, _EXCL, _CREATE

NEWLINK, GETLINK, SETLINK = 16, 18, 19  # RTM_*
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, GETROUTE = 24, 26
NEWNEIGH = 28

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_STATS64 = 1, 3, 4, 23
IFA_ADDRESS, IFA_LOCAL = 1, 2
RTA_DST, RTA_SRC, RTA_OIF, RTA_GATEWAY, RTA_PREFSRC, RTA_METRICS, RTA_TABLE = 1, 2, 4, 5, 7, 8, 15
RTAX_MTU = 2
NDA_DST, NDA_LLADDR = 1, 2

IFF_UP, IFF_LOOPBACK, IFF_NOARP = 0x1, 0x8, 0x80  # linux/if.h
RT_TABLE_MAIN, RTPROT_BOOT, RTN_UNICAST, RT_SCOPE_LINK = 254, 3, 1, 253
NUD_PERMANENT = 0x80
AF_UNSPEC, AF_INET, AF_INET6 = 0, 2, 10

LINK_TYPES = {1: "ethernet", 772: "loopback"}  # linux/if_arp.h


class Message:
    """One message: its type, the body's fixed structure, and its attributes."""

    __slots__ = ("attributes", "fields", "kind")

    def __init__(self, kind: int, fields: tuple[int, ...], attributes: dict[int, bytes]) -> None:
        self.kind = kind
        self.fields = fields
        self.attributes = attributes


class NetlinkError(OSError):
    """The kernel refused a request."""


_STRUCTURES = {NEWLINK: LINK, NEWADDR: ADDRESS, NEWROUTE: ROUTE, NEWNEIGH: NEIGHBOUR}


def attribute(kind: int, value: bytes) -> bytes:
    """Encode one attribute, with its padding."""
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def number(kind: int, value: int) -> bytes:
    """Encode an attribute that is a 32-bit number."""
    return attribute(kind, struct.pack("=I", value))


def name(text: str) -> bytes:
    """Encode the name of a link."""
    return attribute(IFLA_IFNAME, text.encode() + b"\0")


def encode(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """Encode a request."""
    return HEADER.pack(HEADER.size + len(body), kind, flags | REQUEST, sequence, 0) + body


def parse_attributes(data: bytes) -> dict[int, bytes]:
    """Parse attributes up to the end, or up to one that cannot be."""
    result = {}
    position = 0
    while position + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, position)
        if length < ATTRIBUTE.size or position + length > len(data):
            break
        # The two highest bits say how the value is made (NLA_F_NESTED, NLA_F_NET_BYTEORDER).
        result[kind & 0x3FFF] = data[position + ATTRIBUTE.size : position + length]
        position += (length + 3) & ~3
    return result


def parse(data: bytes, sequence: int) -> Iterator[Message | None]:
    """Parse a datagram: the messages that answer this request, and None where its answer ends.

    Raises:
        NetlinkError: the answer is an error.
    """
    position = 0
    while position + HEADER.size <= len(data):
        length, kind, _, number_, _ = HEADER.unpack_from(data, position)
        if length < HEADER.size or position + length > len(data):
            break
        body = data[position + HEADER.size : position + length]
        position += (length + 3) & ~3
        if number_ != sequence:
            continue  # the late answer of a request that was given up
        if kind in (ERROR, DONE):
            code = struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
            if code < 0:
                raise NetlinkError(-code, os.strerror(-code))
            yield None
            return
        structure = _STRUCTURES.get(kind)
        if structure is not None and len(body) >= structure.size:
            yield Message(kind, structure.unpack_from(body), parse_attributes(body[structure.size :]))


# Values


def parse_mac(text: str) -> bytes:
    """Parse a hardware address: "02:42:ac:11:00:02".

    Raises:
        ValueError: it is none.
    """
    return bytes.fromhex(text.replace(":", ""))


def format_mac(value: bytes) -> str:
    """Format a hardware address."""
    return value.hex(":")


# Requests: the body behind the header


def set_link(
    index: int,
    *,
    flags: int = 0,
    change: int = 0,
    rename: str = "",
    mtu: int = 0,
    mac: bytes = b"",
) -> bytes:
    """Change a link: the flags in `change` become those in `flags`, and what is given is set."""
    body = LINK.pack(AF_UNSPEC, 0, index, flags, change)
    if rename:
        body += name(rename)
    if mtu:
        body += number(IFLA_MTU, mtu)
    if mac:
        body += attribute(IFLA_ADDRESS, mac)
    return body


def address(index: int, family: int, value: bytes, prefix: int) -> bytes:
    """Describe an address of a link."""
    body = ADDRESS.pack(family, prefix, 0, 0, index)
    if family == AF_INET:
        body += attribute(IFA_LOCAL, value)
    return body + attribute(IFA_ADDRESS, value)


def route(
    index: int,
    family: int,
    *,
    destination: bytes = b"",
    prefix: int = 0,
    gateway: bytes = b"",
    source: bytes = b"",
    scope: int = 0,
    flags: int = 0,
    mtu: int = 0,
) -> bytes:
    """Describe a route of the main table through a link; without a destination it is the default."""
    header = (family, prefix, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, scope, RTN_UNICAST, flags)
    parts: Iterable[tuple[int, bytes]] = (
        (RTA_DST, destination if prefix else b""),
        (RTA_GATEWAY, gateway),
        (RTA_PREFSRC, source),
        (RTA_METRICS, number(RTAX_MTU, mtu) if mtu else b""),
    )
    body = ROUTE.pack(*header) + b"".join(attribute(kind, value) for kind, value in parts if value)
    return body + number(RTA_OIF, index)


def neighbour(index: int, family: int, value: bytes, mac: bytes, *, state: int = 0, flags: int = 0) -> bytes:
    """Describe whom an address belongs to; the state 0 stands for "permanent"."""
    body = NEIGHBOUR.pack(family, index, state or NUD_PERMANENT, flags, 0)
    return body + attribute(NDA_DST, value) + (attribute(NDA_LLADDR, mac) if mac else b"")
