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
        qmp.device_add("vhost-user-fs-pci", "hot0", {"bus": "port0", **properties}),
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


def test_a_disk_is_plugged_by_its_descriptor_alone() -> None:
    """QEMU could not open the file itself."""
    assert [qmp.add_fd(3), qmp.blockdev_add("d", 3, block=False, read_only=True), qmp.remove_fd(3)] == [
        Command("add-fd", {"fdset-id": 3}),
        Command(
            "blockdev-add",
            {
                "driver": "raw",
                "node-name": "d",
                "read-only": True,
                "file": {"driver": "file", "filename": "/dev/fdset/3"},
            },
        ),
        Command("remove-fd", {"fdset-id": 3}),
    ]
    device = qmp.blockdev_add("d", 3, block=True, read_only=False).arguments["file"]
    assert device == {"driver": "host_device", "filename": "/dev/fdset/3"}


# QEMU 7.2's own words
SLOTS = [
    {"props": {"core-id": 0, "thread-id": 0, "socket-id": 1}, "vcpus-count": 1, "type": "max-x86_64-cpu"},
    {
        "props": {"core-id": 0, "thread-id": 0, "socket-id": 0},
        "vcpus-count": 1,
        "qom-path": "/machine/unattached/device[0]",
        "type": "max-x86_64-cpu",
    },
]


def test_the_free_places_of_processors_are_those_without_one() -> None:
    place = {"core-id": 0, "thread-id": 0, "socket-id": 1}
    assert qmp.parse_free_processors_untrusted(SLOTS) == [("max-x86_64-cpu", place)]


@pytest.mark.parametrize("answer", [None, {}, "x", [None], [{}], [{"type": 5, "props": {}}], [{"type": "t"}]])
def test_an_answer_that_makes_no_sense_has_no_free_place(answer: object) -> None:
    assert qmp.parse_free_processors_untrusted(answer) == []


def test_the_guest_tells_what_became_of_a_device() -> None:
    info = {"device": "dimm-0", "source": 1, "status": 0, "slot": "0", "slot-type": "DIMM"}
    event = parse_event_untrusted({"event": "ACPI_DEVICE_OST", "data": {"info": info}})
    assert event == qmp.GuestAnswer("dimm-0", 0)


@pytest.mark.parametrize(
    "info", [None, {}, {"status": 0}, {"device": "d"}, {"device": "d", "status": True}, 5]
)
def test_what_it_tells_of_nobody_is_not_heard(info: object) -> None:
    assert parse_event_untrusted({"event": "ACPI_DEVICE_OST", "data": {"info": info}}) is None
