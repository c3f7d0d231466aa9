"""rtnetlink messages: captured answers of a kernel, and requests that the kernel itself judges elsewhere."""

from __future__ import annotations

import errno
import json
import socket
from pathlib import Path

import pytest

from agent import netlink
from agent.errors import InvalidArgument
from agent.network import Link, parse_address, parse_network

CAPTURED = json.loads((Path(__file__).parents[1] / "data/agent/rtnetlink.json").read_text())
SEQUENCE = 7


def answer(name: str) -> list[netlink.Message]:
    """All messages of a captured answer, which must have an end."""
    found: list[netlink.Message | None] = []
    for datagram in CAPTURED[name]:
        found += netlink.parse(bytes.fromhex(datagram), SEQUENCE)
    assert found[-1] is None
    return [message for message in found[:-1] if message is not None]


def test_links() -> None:
    links = {link.name: link for link in map(Link, answer("links"))}
    assert links.keys() == {"lo", "veth0", "veth1"}
    veth = links["veth0"]
    assert (veth.mac, veth.mtu, veth.flags & netlink.IFF_UP) == ("02:42:ac:11:00:02", 1400, 1)
    assert links["lo"].flags & netlink.IFF_LOOPBACK
    assert len(veth.stats) >= 64


def test_addresses() -> None:
    found = {
        socket.inet_ntop(message.fields[0], message.attributes[netlink.IFA_ADDRESS]): message.fields[1]
        for message in answer("addresses")
    }
    assert found["172.17.0.2"] == 16
    assert found["fd00::2"] == 64
    assert found["127.0.0.1"] == 8


def test_routes_of_the_main_table() -> None:
    routes = [m for m in answer("routes") if m.fields[4] == netlink.RT_TABLE_MAIN]
    default = next(m for m in routes if netlink.RTA_DST not in m.attributes)
    assert socket.inet_ntoa(default.attributes[netlink.RTA_GATEWAY]) == "172.17.0.1"
    assert socket.inet_ntoa(default.attributes[netlink.RTA_PREFSRC]) == "172.17.0.2"
    assert any(m.fields[1] == 8 and m.attributes.get(netlink.RTA_DST) == bytes([10, 0, 0, 0]) for m in routes)


def test_an_error_is_raised_and_a_zero_is_success() -> None:
    with pytest.raises(netlink.NetlinkError) as caught:
        answer("error")
    assert caught.value.errno == errno.ENODEV
    assert answer("ack") == []


def test_answers_to_older_requests_are_skipped() -> None:
    assert list(netlink.parse(bytes.fromhex(CAPTURED["ack"][0]), SEQUENCE + 1)) == []


@pytest.mark.parametrize("name", ["links", "addresses", "routes", "error"])
def test_a_datagram_that_is_cut_anywhere_is_no_crash(name: str) -> None:
    data = bytes.fromhex(CAPTURED[name][0])
    for length in range(min(len(data), 600)):
        try:
            list(netlink.parse(data[:length], SEQUENCE))
        except netlink.NetlinkError:
            pass


def test_attributes_are_padded_and_counted_without_padding() -> None:
    assert netlink.attribute(3, b"lo\0") == bytes.fromhex("0700 0300 6c6f 0000")
    assert netlink.parse_attributes(netlink.attribute(3, b"lo\0") + netlink.number(4, 9)) == {
        3: b"lo\0",
        4: b"\x09\0\0\0",
    }


def test_addresses_as_text() -> None:
    assert parse_address("10.0.0.1") == (socket.AF_INET, bytes([10, 0, 0, 1]))
    assert parse_address("::1") == (socket.AF_INET6, bytes(15) + b"\1")
    for text in ("", "10.0.0", "no", "10.0.0.1/8", ":::"):
        with pytest.raises(InvalidArgument, match="no IP address"):
            parse_address(text)


def test_networks_as_text() -> None:
    assert parse_network("", socket.AF_INET) == (b"", 0)
    assert parse_network("default", socket.AF_INET6) == (b"", 0)
    assert parse_network("10.0.0.0/8", socket.AF_INET) == (bytes([10, 0, 0, 0]), 8)
    assert parse_network("10.0.0.1", socket.AF_INET)[1] == 32
    with pytest.raises(InvalidArgument, match="no prefix length"):
        parse_network("10.0.0.0/33", socket.AF_INET)
    with pytest.raises(InvalidArgument, match="another family"):
        parse_network("10.0.0.0/8", socket.AF_INET6)


def test_hardware_addresses() -> None:
    assert netlink.format_mac(netlink.parse_mac("02:42:ac:11:00:02")) == "02:42:ac:11:00:02"
