"""What the shim says and understands: log lines, statuses, options, counters, the state table."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any
from hypothesis import example, given
from hypothesis import strategies as st

from protos.containerd import cgroups_v1_pb2, cgroups_v2_pb2, task_types_pb2
from protos.containerd.runtimeoptions_pb2 import Options
from protos.kata.agent_pb2 import StatsContainerResponse
from shim import errors, logs, metrics, options
from shim.bundle import BundleError
from shim.tasks import EXEC_ALLOWED, INIT_ALLOWED, State
from ttrpc.status import Code, Status, StatusError
from vc.errors import AlreadyExists, GuestGone, InvalidArgument, NotFound, VCError

AT = 1136214245.000000123  # 2006-01-02T15:04:05Z, the moment of Go's time formats


def test_a_log_line_is_logrus_text() -> None:
    line = logs.format_line("info", "hello", {"id": "c1", "path": "/a b", "empty": ""}, at=1136214245.5)
    assert line == (
        b'time="2006-01-02T15:04:05.500000000Z" level=info msg="hello" id=c1 path="/a b" empty=""\n'
    )


def test_a_log_line_is_one_line_whatever_is_said() -> None:
    line = logs.format_line("error", 'a "b"\n\\c\x1b\u2028', {}, at=AT)
    assert line.endswith(b'msg="a \\"b\\"\\n\\\\c\\u001b\\u2028"\n')


@given(st.text(), st.integers(0, 9000))
@example("\U00100000", 403)  # the cut falls on the opening quote of the second field
@example("\\", 2013)  # and between the two characters of an escape
def test_a_log_line_fits_into_a_pipe_at_once_and_its_quotes_are_closed(text: str, times: int) -> None:
    line = logs.format_line("info", text * times, {"id": text}, at=AT)
    assert len(line) <= logs.MAX_LINE
    assert line.count(b"\n") == 1
    assert re.fullmatch(rb'(?:[^"\\]|"(?:[^"\\]|\\.)*")*', line)


def log_pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    return reader, writer


def warn(handler: logging.Handler, text: str) -> None:
    handler.handle(logging.LogRecord("x", logging.WARNING, __file__, 1, text, (), None))


def test_a_log_that_nobody_reads_neither_blocks_nor_fails() -> None:
    reader, writer = log_pipe()
    handler = logs.FifoHandler(writer, {"id": "c1"})
    for number in range(5000):
        warn(handler, f"text {number}")
    assert os.read(reader, 30).startswith(b'time="')
    os.close(reader)
    warn(handler, "too late")
    os.close(writer)


def test_a_log_whose_reader_has_left_goes_on_where_there_is_another(tmp_path: Path) -> None:
    left, unread, file, read = paths = [tmp_path / name for name in ("left", "unread", "file", "read")]
    file.touch()
    for fifo in (left, unread, read):
        os.mkfifo(fifo)
    readers = [os.open(fifo, os.O_RDONLY | os.O_NONBLOCK) for fifo in (left, read)]
    descriptor = os.open(left, os.O_WRONLY | os.O_NONBLOCK)
    handler = logs.FifoHandler(descriptor, {})
    handler.fifos = lambda: map(str, paths)
    warn(handler, "first")
    assert b'msg="first"' in os.read(readers[0], 1000)
    os.close(readers[0])
    warn(handler, "second")
    warn(handler, "third")
    told = os.read(readers[1], 1000)
    assert re.findall(rb'msg="(\w+)"', told) == [b"second", b"third"]
    assert file.read_bytes() == b""
    os.close(readers[1])
    os.close(descriptor)


def test_warnings_that_nobody_read_come_when_somebody_does_in_order_and_bounded(tmp_path: Path) -> None:
    """containerd was restarted, and what a pod died of meanwhile was not to be found in any log."""
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    handler = logs.FifoHandler(writer, {})

    def log(level: int, text: str) -> None:
        handler.handle(logging.LogRecord("x", level, __file__, 1, text, (), None))

    os.close(reader)
    for number in range(logs.KEPT_LINES + 1):
        log(logging.ERROR, f"error {number}")
        log(logging.INFO, "nothing")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    log(logging.INFO, "again")
    handler.flush()  # has nothing more to write
    texts = re.findall(rb'msg="(.*?)"', os.read(reader, 65536))
    assert texts == [b"error %d" % number for number in range(1, logs.KEPT_LINES + 1)] + [b"again"]
    os.close(reader)
    log(logging.WARNING, "unread")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    handler.flush()
    assert re.findall(rb'msg="(.*?)"', os.read(reader, 65536)) == [b"unread"]
    for descriptor in (reader, writer):
        os.close(descriptor)


def test_a_traceback_is_one_line_of_the_log() -> None:
    reader, writer = log_pipe()
    try:
        raise ValueError("broken " + "x" * 10000)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "it failed", (), sys.exc_info())
    logs.FifoHandler(writer, {"id": "c1"}).handle(record)
    line = os.read(reader, 8192)
    assert line.count(b"\n") == 1
    assert b"level=error" in line
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    ("exc", "status"),
    [
        (NotFound("no task 'c1'"), Status(Code.NOT_FOUND, "no task 'c1': not found")),
        (NotFound("process not found"), Status(Code.NOT_FOUND, "process not found")),
        (AlreadyExists("task 'c1'"), Status(Code.ALREADY_EXISTS, "task 'c1': already exists")),
        (BundleError("no config.json"), Status(Code.INVALID_ARGUMENT, "no config.json: invalid argument")),
        (GuestGone("the VM died"), Status(Code.INTERNAL, "the VM died")),
        (StatusError(Code.ABORTED, "x"), Status(Code.ABORTED, "x")),
        (ZeroDivisionError("bug"), Status(Code.UNKNOWN, "ZeroDivisionError: bug")),
        (
            ExceptionGroup("g", [ValueError("x"), ExceptionGroup("h", [InvalidArgument("y")])]),
            Status(Code.INVALID_ARGUMENT, "y: invalid argument"),
        ),
    ],
)
def test_exceptions_have_a_status_also_in_groups(exc: Exception, status: Status) -> None:
    assert errors.status_of(exc) == status


def test_no_foreseen_error_is_answered_as_a_bug() -> None:
    def classes(cls: type[VCError]) -> list[type[VCError]]:
        return [cls, *(each for sub in cls.__subclasses__() for each in classes(sub))]

    for cls in classes(VCError):
        exc = cls.__new__(cls)
        Exception.__init__(exc, "text")
        assert errors.status_of(exc).code is not Code.UNKNOWN


def test_only_our_options_name_a_configuration() -> None:
    ours = Options(config_path="/etc/kata.toml").SerializeToString()
    assert options.config_path(Any(type_url="runtimeoptions.v1.Options", value=ours)) == "/etc/kata.toml"
    prefixed = Any(type_url="type.googleapis.com/cri.runtimeoptions.v1.Options", value=ours)
    assert options.config_path(prefixed) == "/etc/kata.toml"
    assert options.config_path(Any(type_url="runtimeoptions.v1.Options")) is None
    assert options.config_path(Any(type_url="containerd.runc.v1.Options", value=b"\xff")) is None
    assert options.config_path(Any()) is None
    with pytest.raises(InvalidArgument, match=r"runtimeoptions\.v1\.Options"):
        options.config_path(Any(type_url="runtimeoptions.v1.Options", value=b"\xff"))


def test_states_have_the_numbers_of_the_messages() -> None:
    for state in State:
        assert task_types_pb2.Status.Value(state.name) == state


def test_every_operation_is_allowed_in_some_state_and_nothing_but_delete_in_stopped() -> None:
    for table in (INIT_ALLOWED, EXEC_ALLOWED):
        assert all(table.values())
        assert [name for name, states in table.items() if State.STOPPED in states] == ["deleted"]


def guest_stats(**memory: int) -> StatsContainerResponse:
    stats = StatsContainerResponse()
    group = stats.cgroup_stats
    group.cpu_stats.cpu_usage.total_usage = 5_000_000
    group.cpu_stats.cpu_usage.usage_in_usermode = 3_000_000
    group.cpu_stats.cpu_usage.usage_in_kernelmode = 2_000_000
    group.pids_stats.current = 4
    group.memory_stats.usage.usage = 1000
    group.memory_stats.usage.limit = 4096
    for key, value in memory.items():
        group.memory_stats.stats[key] = value
    for op, value in (("Read", 10), ("Write", 20), ("Sync", 5)):
        group.blkio_stats.io_service_bytes_recursive.add(op=op, major=254, minor=0, value=value)
    stats.network_stats.add(name="eth0", rx_bytes=7, tx_dropped=1)
    return stats


def test_counters_for_a_host_with_cgroup_v1() -> None:
    found = metrics.metrics_v1(guest_stats(total_rss=300, total_inactive_file=200, pgfault=9, oom_kill=2))
    assert (found.cpu.usage.total, found.cpu.usage.user, found.cpu.usage.kernel) == (
        5_000_000,
        3_000_000,
        2_000_000,
    )
    assert (found.memory.usage.usage, found.memory.usage.limit) == (1000, 4096)
    assert (found.memory.total_rss, found.memory.total_inactive_file) == (300, 200)
    assert (found.memory.pg_fault, found.memory.total_pg_fault) == (9, 9)
    assert found.memory_oom_control.oom_kill == 2
    assert [entry.value for entry in found.blkio.io_service_bytes_recursive] == [10, 20, 5]
    assert (found.network[0].name, found.network[0].rx_bytes, found.network[0].tx_dropped) == ("eth0", 7, 1)


def test_counters_for_a_host_with_cgroup_v2() -> None:
    found = metrics.metrics_v2(guest_stats(anon=300, inactive_file=200, pgfault=9, slab=5, unknown=1))
    assert (found.cpu.usage_usec, found.cpu.user_usec, found.cpu.system_usec) == (5000, 3000, 2000)
    assert (found.memory.usage, found.memory.usage_limit, found.memory.anon) == (1000, 4096, 300)
    assert (found.memory.inactive_file, found.memory.pgfault, found.memory.slab) == (200, 9, 5)
    assert [(io.major, io.rbytes, io.wbytes) for io in found.io.usage] == [(254, 10, 20)]
    assert found.pids.current == 4


def test_a_guest_counts_by_its_own_hierarchy_whatever_the_hosts_is() -> None:
    assert metrics.metrics_v1(guest_stats(anon=300, inactive_file=2)).memory.total_rss == 300
    assert metrics.metrics_v1(guest_stats(inactive_file=2)).memory.total_inactive_file == 2
    assert metrics.metrics_v2(guest_stats(total_rss=300, rss=1)).memory.anon == 300


def test_parts_that_clients_do_not_ask_for_are_there_even_if_empty() -> None:
    """CRI-O and ctr dereference these without looking."""
    old = cgroups_v1_pb2.Metrics.FromString(metrics.metrics(StatsContainerResponse(), unified=False).value)
    assert all(old.HasField(name) for name in ("pids", "cpu", "memory"))
    assert all(old.cpu.HasField(name) for name in ("usage", "throttling"))
    assert all(old.memory.HasField(name) for name in ("usage", "swap", "kernel", "kernel_tcp"))
    new = cgroups_v2_pb2.Metrics.FromString(metrics.metrics(StatsContainerResponse(), unified=True).value)
    assert all(new.HasField(name) for name in ("pids", "cpu", "memory", "memory_events"))


def test_the_type_of_counters_is_named_as_containerd_compares_it() -> None:
    stats = StatsContainerResponse()
    assert metrics.metrics(stats, unified=False).type_url == "io.containerd.cgroups.v1.Metrics"
    assert metrics.metrics(stats, unified=True).type_url == "io.containerd.cgroups.v2.Metrics"
    seen = metrics.metrics(stats, unified=True, oom_kills=1)
    assert cgroups_v2_pb2.Metrics.FromString(seen.value).memory_events.oom_kill == 1


def test_a_host_is_unified_if_the_top_of_its_hierarchy_is(tmp_path: Path) -> None:
    assert not metrics.host_is_unified(tmp_path)
    (tmp_path / "cgroup.controllers").touch()
    assert metrics.host_is_unified(tmp_path)
