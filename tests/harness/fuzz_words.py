"""Fuzz targets: what QEMU, the guest, containerd and its clients say, files, and what the agent is asked."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from agent import jsontext, mounts, netlink, network, oci, storage, uevents
from agent.errors import AgentError as GuestError
from protos.kata import agent_pb2, oci_pb2
from shim import bootstrap, metrics
from shim.bundle import BundleError, annotations_of, group_of, parse_config
from shim.sandbox import sandbox_spec
from shim.stdio_uri import plan
from shim.tasks import Stdio
from tests.harness.fuzz_inputs import Choices, file, target
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
