"""What reads others' bytes, as functions of bytes: for Hypothesis in the suite, and for long runs by atheris.

A target is called with any bytes at all. It returns, or raises `AssertionError` for a broken promise; any
other exception is a bug of what it called. Errors that the tested function promises are caught here, so that
each target is also the list of what its function may raise. What a run has found becomes a seed.

`python -m tests.harness.fuzz TARGET FILE` replays one input.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import trio
import trio.testing
from google.protobuf.message import DecodeError

from agent import jsontext, mounts, netlink, network, oci, storage, uevents
from agent.errors import AgentError as GuestError
from protos.containerd import task_v2_pb2
from protos.kata import agent_pb2, oci_pb2
from protos.ttrpc.ttrpc_pb2 import Request
from shim import bootstrap, metrics
from shim.bundle import BundleError, annotations_of, group_of, parse_config
from shim.sandbox import sandbox_spec
from shim.stdio_uri import plan
from shim.tasks import Stdio
from ttrpc import methods
from ttrpc.connection import MAX_UNREAD, MESSAGE_OVERHEAD, ClientConnection, ServerConnection
from ttrpc.events import CallReceived, MessageReceived
from ttrpc.frames import DATA, REQUEST, RESPONSE, encode_frame
from ttrpc.status import Code, Status
from vc.agent_client import transports
from vc.config import Config, apply_annotations, load
from vc.config.schema import HypervisorConfig
from vc.errors import InvalidArgument, Unsupported, VCError
from vc.factory.templates import BrokenTemplate, parse_manifest
from vc.hypervisor.console import MAX_BYTES, MAX_LINE_BYTES, MAX_LINES, ConsoleTail
from vc.hypervisor.qemu.qmp import describe_shutdown, parse_event_untrusted
from vc.oci import spec as vc_oci
from vc.oci.mounts import FileKind, HostFile, plan_mounts
from vc.oci.translate import guest_resources, guest_spec
from vc.persist.schema import BrokenRecord, parse_record
from yamux.connection import BACKLOG, Connection
from yamux.errors import RemoteProtocolError
from yamux.events import DataReceived, StreamOpened
from yamux.frames import HEADER_SIZE, INITIAL_WINDOW, MAX_UINT32, encode_header
from yamux.resync import Initiator, Responder
from yamux.session import Session

ROOT = Path(__file__).resolve().parents[2]
DATA_FILES = ROOT / "tests" / "data"
AGENT_SERVICE = agent_pb2.DESCRIPTOR.services_by_name["AgentService"]
TASK_SERVICE = task_v2_pb2.DESCRIPTOR.services_by_name["Task"]
AGENT_METHODS = methods.service(AGENT_SERVICE)
TABLES = {entry.full_name: methods.service(entry) for entry in (AGENT_SERVICE, TASK_SERVICE)}
CHAT = methods.Method("fuzz", "Chat", agent_pb2.Metrics, agent_pb2.Metrics, client_streaming=True,
                      server_streaming=True)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """One function of bytes, and inputs from which a fuzzer finds its way into it."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...] = ()


TARGETS: dict[str, Target] = {}


def target(*seeds: bytes) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    """Put a function into the list, under its own name."""

    def add(function: Callable[[bytes], None]) -> Callable[[bytes], None]:
        TARGETS[function.__name__.replace("_", "-")] = Target(function, seeds)
        return function

    return add


class Choices:
    """Decisions taken from the input's first bytes; all zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self.rest = data

    def number(self, limit: int) -> int:
        """Return one of the numbers below `limit`, which is 256 at most."""
        if not self.rest:
            return 0
        value, self.rest = self.rest[0], self.rest[1:]
        return value % limit

    def piece(self, limit: int) -> bytes:
        """Return the next bytes, fewer than `limit`."""
        size = self.number(limit)
        value, self.rest = self.rest[:size], self.rest[size:]
        return value


def file(name: str) -> bytes:
    """Return a file of the test data."""
    return (DATA_FILES / name).read_bytes()


def captured(package: str, kind: str) -> list[bytes]:
    """Return the bytes of other implementations that the tests keep as hexadecimal text, the short ones."""
    found = []
    for path in sorted((DATA_FILES / package).glob(f"*{kind}.hex")):
        words = "".join(line for line in path.read_text().splitlines(keepends=True) if line[0] != "#").split()
        if not any("*" in word or word.startswith("zeros") for word in words):  # abbreviated: see the files
            found.append(bytes.fromhex("".join(words)))
    return found


def cut(stream: bytes, before: bytes = b"") -> bytes:
    """Return the input from which `Choices.piece` takes these bytes, with `before` before each piece."""
    parts = [stream[start : start + 255] for start in range(0, len(stream), 255)]
    return b"".join(before + bytes([len(part)]) + part for part in parts)


# ttrpc


@target(
    *map(cut, captured("ttrpc", ".client")),
    cut(encode_frame(1, REQUEST, 0, b"\x0a\x01x")),
    cut(
        b"".join(
            encode_frame(2 * number + 1, REQUEST, 0, Request(service=name, method=method).SerializeToString())
            for number, (name, method) in enumerate((name, next(iter(TABLES[name]))) for name in TABLES)
        )
    ),
)
def ttrpc_server(data: bytes) -> None:
    """A server answers, refuses or ends each call once, and owes its peer a bounded number of bytes."""
    choices = Choices(data)
    server = ServerConnection(TABLES)
    answered: set[int] = set()
    while choices.rest:
        for event in server.receive_data(choices.piece(256)):
            if not isinstance(event, CallReceived):
                continue
            assert event.stream_id not in answered
            answered.add(event.stream_id)
            if choices.number(3):
                server.reply(event.stream_id, event.method.response_class())
            else:
                server.fail(event.stream_id, Status(Code.INTERNAL, "\ud800"))
            assert not server.is_open(event.stream_id)
    server.receive_eof()
    assert server.queued_bytes <= 1000 + 40 * len(data)
    assert server.open_calls == 0


@target(
    *map(cut, captured("ttrpc", ".server")),
    cut(encode_frame(1, RESPONSE, 0, b"\x0a\x02\x08\x01") + encode_frame(7, DATA, 5, b"")),
)
def ttrpc_client(data: bytes) -> None:
    """Each call of a client ends exactly once, and what waits for its reader is bounded."""
    choices = Choices(data)
    client = ClientConnection()
    calls = [AGENT_METHODS[name] for name in ("WaitProcess", "StatsContainer", "CreateContainer")]
    ids = {client.start_call(method, method.request_class()) for method in calls}
    ids.add(client.start_call(CHAT, None))
    client.data_to_send()
    ended: list[int] = []
    unread = 0
    events = []
    while choices.rest:
        events += client.receive_data(choices.piece(256))
    for event in (*events, *client.receive_eof()):
        assert event.stream_id in ids
        if isinstance(event, MessageReceived):
            unread += event.cost
            assert event.cost >= MESSAGE_OVERHEAD
        else:
            ended.append(event.stream_id)
    assert sorted(ended) == sorted(ids)
    assert unread <= MAX_UNREAD


# yamux


@target(
    *(b"\0\2" + cut(stream, b"\0") for stream in captured("yamux", "_c2s")),
    *(b"\1\2\4" + cut(stream, b"\0") for stream in captured("yamux", "_s2c")),
    b"\0\2" + cut(encode_header(0, 1, 1, 3) + b"abc", b"\0") + b"\5\6\0\1",
)
def yamux_connection(data: bytes) -> None:
    """A peer breaks its own session at worst; it cannot make us hold more than it was granted."""
    choices = Choices(data)
    backlog = choices.number(3)
    connection = Connection(client=choices.number(2) == 1, backlog=backlog)
    ours: list[int] = []
    theirs: list[int] = []
    unconsumed: dict[int, int] = {}
    while choices.rest and not connection.closed:
        act = choices.number(8)
        try:
            events = connection.receive_data(choices.piece(256)) if act < 4 else []
        except RemoteProtocolError as error:
            assert str(error).isprintable()
            events = error.events
        for event in events:
            if isinstance(event, DataReceived):
                unconsumed[event.stream_id] = unconsumed.get(event.stream_id, 0) + len(event.data)
                assert unconsumed[event.stream_id] <= INITIAL_WINDOW
            elif isinstance(event, StreamOpened):
                theirs.append(event.stream_id)
        assert connection._unaccepted <= backlog and len(connection._streams) <= BACKLOG
        _act(connection, act, choices, ours, theirs)
        if act == 7:
            connection.data_to_send()
            for stream, size in unconsumed.items():
                connection.consumed(stream, size if connection.is_live(stream) else 0)
            unconsumed.clear()
    assert len(connection.data_to_send()) <= 4096 * HEADER_SIZE


def _act(connection: Connection, act: int, choices: Choices, ours: list[int], theirs: list[int]) -> None:
    """Do what an application may do in any state."""
    if act == 4 and not connection.closed and connection.peer_reason is None and len(ours) < 4:
        ours.append(connection.open_stream())
    elif act == 5 and theirs and connection.is_live(theirs[0]):
        connection.accept_stream(theirs.pop(0))
    elif act == 6 and ours and connection.is_live(stream := ours[choices.number(len(ours))]):
        if connection.send_credit(stream) > 3 and choices.number(2):
            connection.send_data(stream, b"abc")
        else:
            connection.reset_stream(stream)


@target(*map(cut, captured("yamux", "_s2c")))
def yamux_session(data: bytes) -> None:
    """A session whose line brings any bytes ends, and every reader and writer of a stream with it."""

    async def feed(line: trio.abc.Stream) -> None:
        choices = Choices(data)
        try:
            while choices.rest:
                await line.send_all(choices.piece(256) or b"\0")
            await line.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def use(session: Session) -> None:
        try:
            stream = await session.open_stream()
            await stream.send_all(b"x" * 100)
            while await stream.receive_some(10):
                pass
            await stream.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        session = Session(near, client=True, backlog=0)
        with trio.fail_after(100):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(use, session)
                nursery.start_soon(feed, far)
                try:
                    await session.run()
                except (trio.BrokenResourceError, RemoteProtocolError):
                    pass
        await trio.aclose_forcefully(far)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@target(
    cut(encode_header(2, 1, 0, 7)),
    cut(encode_header(2, 2, 0, 7) + encode_header(2, 2, 0, 7 ^ MAX_UINT32) + b"x"),
)
def resync(data: bytes) -> None:
    """Both sides of the handshake find their frame, or remember less than a header."""
    initiator, responder = Initiator(nonce=7), Responder()
    choices = Choices(data)
    fed = 0
    while choices.rest:
        piece = choices.piece(40)
        fed += len(piece)
        for side in (initiator, responder):
            if not side.done:
                side.receive_data(piece)
            assert len(side._tail) < HEADER_SIZE
            assert len(side.trailing_data) <= fed
    responder.data_to_send()


@target(b"OK 1024\nrest", b"\xe2" * 256 + b"\n", b"ERR no such port\n", b"OK", b"\xff\n", b"x" * 300)
def connect_line(data: bytes) -> None:
    """The answer to CONNECT opens a stream at its first byte, or is refused in printable words."""

    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        await far.send_all(data or b"\n")
        await far.send_stream.aclose()
        try:
            await transports._greet(near, 1024)
        except transports._Refused as refused:
            assert str(refused).isprintable() and len(str(refused)) <= 6 * transports.MAX_LINE_BYTES
        else:
            rest = b"".join([piece async for piece in near])
            assert data.startswith(b"OK") and data.partition(b"\n")[2] == rest

    trio.run(main)


# What QEMU and the guest say


@target(
    b'{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-panic"}}',
    b'{"event": "MIGRATION", "data": {"status": "completed"}}',
    b'{"event": "DEVICE_DELETED", "data": {"device": "hot1"}}',
)
def qmp_event(data: bytes) -> None:
    """No event makes the reader fail."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(message, dict):
        event = parse_event_untrusted(message)
        if hasattr(event, "reason"):
            assert len(describe_shutdown(event)) < 200  # type: ignore[arg-type]


@target(b"\x1b[31mred\x1b[0m\r\n", b"\xff\xfe\x00\n" * 4, b"\x1b]0;title\x07x")
def console(data: bytes) -> None:
    """Whatever a guest prints, it is kept within bounds and can be shown."""
    lines: list[str] = []
    tail = ConsoleTail(on_line=lines.append)
    choices = Choices(data)
    while choices.rest:
        tail.feed(choices.piece(256) * (1 + choices.number(4)))
    shown = tail.lines()
    assert len(shown) <= MAX_LINES + 1
    assert sum(map(len, tail._lines)) <= MAX_BYTES and len(tail._partial) <= MAX_LINE_BYTES
    assert all(line.isprintable() for line in (*shown, *lines))


@target(
    agent_pb2.StatsContainerResponse(network_stats=[agent_pb2.NetworkStats(name="eth0")]).SerializeToString()
)
def stats(data: bytes) -> None:
    """Any counters of a guest can be told to containerd."""
    try:
        message = agent_pb2.StatsContainerResponse.FromString(data)
    except DecodeError:
        return
    for unified in (False, True):
        metrics.metrics(message, unified=unified)


# What containerd and its clients say


@cache
def _base_config() -> Config:
    return Config(Path("/c"), HypervisorConfig(enable_annotations=(".*",)))


def _look(path: str) -> HostFile | None:
    kinds = list(FileKind)
    return HostFile(kinds[len(path) % len(kinds)]) if len(path) % 3 else None


@target(*(file(f"oci/{name}.json") for name in ("everything", "containerd-default", "runc-default")))
def config_json(data: bytes) -> None:
    """A config.json is understood by all who read it, or refused by one kind of error on one line."""
    try:
        found = vc_oci.parse_spec(data)
        notes = vc_oci.read_annotations(found)
        vc_oci.identify(notes, "c1")
        planned = plan_mounts(found, _look)
        guest_spec(found, root_path="/r", mounts=[item.mount for item in planned], seccomp=True)
        guest_resources((found.get("linux") or {}).get("resources") or {})
        sandbox_spec("s", found, _base_config())
    except (InvalidArgument, Unsupported) as exc:
        assert str(exc).isprintable() and len(str(exc)) < 1000, str(exc)


@target(b'{"annotations": {"io.kubernetes.cri.container-type": "container"}}', b'{"annotations": {"a": 1}}')
def bundle(data: bytes) -> None:
    """What `start` reads of a config.json is understood, or refused by one kind of error."""
    try:
        group_of(annotations_of(parse_config(data, "p"), "p"), "c1")
    except BundleError as exc:
        assert len(str(exc)) < 2000 + len(data)


@target(b"binary:///bin/log?a=b\0file:///x\0", b"fifo:///a\0/b\0/c", b"/x\0\0\x01", b"\0binary://b[in/log")
def stdio_uri(data: bytes) -> None:
    """Any names of streams have a plan with absolute paths, or are refused."""
    words = data.decode("utf-8", "surrogateescape").split("\0")
    stdin, stdout, stderr = (*words, "", "", "")[:3]
    try:
        planned = plan(Stdio(stdin, stdout, stderr, terminal=len(words) > 3))
    except InvalidArgument:
        return
    for place in (planned.stdout.path, planned.stderr.path, planned.stdin):
        assert not place or (place.startswith("/") and "\0" not in place)


@target(b"\x0a\x02c1\x12\x02ns")
def bootstrap_params(data: bytes) -> None:
    """No input of `start` makes it fail."""
    bootstrap.parse_untrusted(data, task_id="c1", namespace="ns")


@target(b'{"default_vcpus": "2", "default_memory": "512", "kernel_params": "a=1"}', b'{"path": "/x"}')
def pod_annotations(data: bytes) -> None:
    """Any annotations give a configuration, or are refused on one line."""
    try:
        wishes = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(wishes, dict) or not all(isinstance(value, str) for value in wishes.values()):
        return
    prefix = "io.katacontainers.config."
    try:
        for section in ("hypervisor.", "agent.", "runtime."):
            apply_annotations(_base_config(), {prefix + section + k: v for k, v in wishes.items()}, 2)
    except VCError as exc:
        assert str(exc).isprintable(), str(exc)


# Files


@target(file("config/kata-qemu.toml"), b'[hypervisor.qemu]\nkernel = "/k"\nimage = "/i"\n')
def configuration(data: bytes) -> None:
    """A configuration file loads, or is refused by one kind of error that can be shown."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm", suffix=".toml") as temporary:
        temporary.write(data)
        temporary.flush()
        try:
            load(temporary.name, {}, check_files=False)
        except InvalidArgument as exc:
            assert str(exc)


RECORD = {"version": 1, "id": "a", "vmid": "b", "owner_pid": 1, "owner_start_ticks": 2, "config_path": "",
          "created_at": 1.5}  # fmt: skip


@target(json.dumps(RECORD).encode(), b"[" * 100_000)
def record(data: bytes) -> None:
    """A sandbox's record is read with the types that it claims, or is broken."""
    try:
        found = parse_record(data)
    except BrokenRecord:
        return
    for name, example in RECORD.items():
        assert isinstance(getattr(found, name), (type(example), int)), name


MANIFEST = {"key": "k", "memory_mib": 1, "vcpus": 1, "memory_bytes": 1, "data_bytes": 1, "state_bytes": 1,
            "memory_checksum": 1, "state_checksum": 1, "details": "", "made_at": 1.5,
            "facts": {}}  # fmt: skip


@target(json.dumps(MANIFEST).encode(), b"[" * 100_000)
def manifest(data: bytes) -> None:
    """A template's manifest is read with the types that it claims, or is broken."""
    try:
        found = parse_manifest(data)
    except BrokenTemplate:
        return
    for name, example in MANIFEST.items():
        assert type(getattr(found, name)) is type(example), name


# The guest's side


@target(oci_pb2.Spec(Process=oci_pb2.Process(Args=["a"])).SerializeToString())
def agent_spec(data: bytes) -> None:
    """The agent makes JSON of any spec that a host sends, or refuses it."""
    try:
        message = oci_pb2.Spec.FromString(data)
    except DecodeError:
        return
    try:
        made = oci.config(message, root="/r", namespaces={"ipc": ""}, cgroups_path="/c", add_hostname=True)
    except GuestError:
        return
    assert json.loads(jsontext.encode(made))["ociVersion"] == oci.OCI_VERSION
    assert all(".." not in Path(path).parts for path in oci.net_sysctls(message))
    assert ".." not in Path(oci.cgroups_path(message.Linux.CgroupsPath, "c")).parts


@target(b"fsgid=5\nsize=1m\n10.0.0.1/24\n02:00:00:00:00:01", "fsgid=²".encode(), "10.0.0.0/²".encode())
def agent_words(data: bytes) -> None:
    """The words of a request to the agent are understood, or refused by the agent's own errors."""
    lines = data.decode("utf-8", "replace").split("\n")
    _refusing(partial(storage.split_group, lines))
    storage.find_option(lines, "size")
    mounts.parse_options(lines)
    for line in lines:
        for family in (netlink.AF_INET, netlink.AF_INET6):
            _refusing(partial(network.parse_network, line, family))
        _refusing(partial(network.parse_address, line))
        _refusing(partial(network._mac, line))
    uevents.parse(data)


def _refusing(call: Callable[[], Any]) -> None:
    try:
        call()
    except GuestError:
        pass


def main() -> None:
    """Run one target on one file."""
    name, path = sys.argv[1:]
    TARGETS[name].run(Path(path).read_bytes())


if __name__ == "__main__":
    main()
