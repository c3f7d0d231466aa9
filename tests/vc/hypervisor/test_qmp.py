"""QMP commands as data, and events as QEMU writes them (recorded from QEMU 7.2)."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vc.hypervisor.qemu import qmp
from vc.hypervisor.qemu.qmp import (
    Command,
    DeviceDeleted,
    Event,
    Resumed,
    Shutdown,
    Stopped,
    describe_shutdown,
    parse_event_untrusted,
)


def test_a_share_is_plugged_by_these_commands() -> None:
    properties = {"chardev": "hot0-socket", "tag": "kataShared"}
    assert [
        qmp.getfd("hot0-socket"),
        qmp.chardev_add_socket("hot0-socket", "hot0-socket"),
        qmp.device_add("vhost-user-fs-pci", "hot0", "port0", properties),
    ] == [
        Command("getfd", {"fdname": "hot0-socket"}),
        Command(
            "chardev-add",
            {
                "id": "hot0-socket",
                "backend": {
                    "type": "socket",
                    "data": {"addr": {"type": "fd", "data": {"str": "hot0-socket"}}, "server": False},
                },
            },
        ),
        Command(
            "device_add",
            {
                "driver": "vhost-user-fs-pci",
                "id": "hot0",
                "bus": "port0",
                "chardev": "hot0-socket",
                "tag": "kataShared",
            },
        ),
    ]


@pytest.mark.parametrize(
    ("text", "event"),
    [
        (
            '{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}',
            Shutdown(True, "guest-reset"),
        ),
        (
            '{"event": "SHUTDOWN", "data": {"guest": false, "reason": "host-signal"}}',
            Shutdown(False, "host-signal"),
        ),
        ('{"event": "STOP"}', Stopped()),
        ('{"event": "RESUME"}', Resumed()),
        ('{"event": "DEVICE_DELETED", "data": {"device": "hot0", "path": "/p"}}', DeviceDeleted("hot0")),
        ('{"event": "DEVICE_DELETED", "data": {"path": "/p"}}', None),
        ('{"event": "DEVICE_DELETED", "data": {"device": 7}}', None),
        ('{"event": "SHUTDOWN", "data": null}', Shutdown(False, "unknown")),
        ('{"event": "NIC_RX_FILTER_CHANGED", "data": {}}', None),
        ('{"event": ["STOP"]}', None),
        ("{}", None),
    ],
)
def test_events_are_read_with_care(text: str, event: Event | None) -> None:
    assert parse_event_untrusted(json.loads(text)) == event


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@given(st.sampled_from(qmp.EVENT_NAMES), JSON)
def test_no_event_makes_the_reader_fail(name: str, data: object) -> None:
    parse_event_untrusted({"event": name, "data": data})


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("guest-reset", "the guest restarted itself"),
        ("guest-shutdown", "the guest powered itself off"),
        ("host-signal", "(host-signal)"),
    ],
)
def test_the_end_of_a_machine_is_told_in_words(reason: str, said: str) -> None:
    assert said in describe_shutdown(Shutdown(True, reason))
