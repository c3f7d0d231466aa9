"""What is wrong is told: in one readable sentence, with the right code, at once, and nothing is left behind.

Each case is a mistake that somebody makes: in the configuration, in a spec, in a request. The words are for a
person who reads them at a client.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from protos.containerd import task_v2_pb2
from tests.e2e.conftest import NoLeaks
from tests.harness.containerd import Containerd, Result
from tests.harness.image import unpack_image
from tests.harness.leaks import shim_socket
from tests.harness.runtimes import Runtime
from ttrpc import methods
from ttrpc.client import Client
from ttrpc.status import Code, StatusError

LIMIT = 30.0  # seconds: all of this is known before a boot, or soon after its start
TASK = methods.service(task_v2_pb2.DESCRIPTOR.services_by_name["Task"])
QEMU = "[hypervisor.qemu]"

# What a sentence for people does not hold: tracebacks, reprs, errno in brackets, control characters.
UNREADABLE = re.compile(r"Traceback|\[Errno|object at 0x|\bNone\b|\\x|\\n|[^\x20-\x7e…]")


def sentence_of(result: Result) -> str:
    """The client's error: one line, told once, that a person can read."""
    assert result.exit_status != 0, result
    text = result.stderr.decode().strip()
    assert UNREADABLE.search(text) is None, text
    assert len(text) < 500, text
    parts = text.split(": ")
    assert len(parts) == len(set(parts)), text
    return text


@pytest.fixture(autouse=True)
def _on_a_vm(vm_runtime: Runtime) -> None:
    """All of this is about what only our runtime has."""


@pytest.fixture
def configuration(containerd: Containerd) -> Iterator[Path]:
    """The configuration file, to be spoilt; it is whole again afterwards."""
    path = containerd.directory / "configuration.toml"
    whole = path.read_text()
    yield path
    path.write_text(whole)


def with_key(key: str, value: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        changed, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        assert count == 1
        return changed

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_key("kernel", '"/no/such"'), ["hypervisor.qemu.kernel = /no/such", "No such file"]),
        (with_key("image", '"/no/such"'), ["hypervisor.qemu.image = /no/such", "No such file"]),
        (with_key("initrd", '"/no/such"'), ["hypervisor.qemu.initrd = /no/such", "No such file"]),
        (with_key("path", '"/no/such"'), ["hypervisor.qemu.path = /no/such", "install QEMU"]),
        (with_key("path", '"/etc/passwd"'), ["QEMU", "/etc/passwd", "Permission denied", "check"]),
        (with_key("path", '"/bin/true"'), ["QEMU", "exited with status 0", "check"]),
        (with_key("virtio_fs_daemon", '"/no/such"'), ["virtio_fs_daemon = /no/such", "install virtiofsd"]),
        (with_key("virtio_fs_daemon", '"/bin/false"'), ["virtiofsd", "exited with status 1", "check"]),
        (with_key("machine_type", '"nonsense"'), ['machine type "nonsense"', "q35", "not implemented"]),
        (with_key("default_vcpus", '"two"'), ['default_vcpus: got "two"', "must be a number"]),
        (lambda text: text.replace(QEMU, f"{QEMU}\nno_such_key = 1", 1), ["no_such_key", "unknown key"]),
        (lambda text: text + "\n[[[", ["is not TOML", "line"]),
        (lambda text: "", ["hypervisor.qemu.kernel is not set"]),
    ],
    ids=lambda value: value[0].partition(" ")[0] if isinstance(value, list) else "",
)
def test_a_configuration_that_cannot_work(
    containerd: Containerd,
    configuration: Path,
    no_leaks: NoLeaks,
    change: Callable[[str], str],
    words: list[str],
) -> None:
    configuration.write_text(change(configuration.read_text()))
    with no_leaks():
        sentence = sentence_of(containerd.run("true", timeout=LIMIT))
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--runtime-config-path", "/no/such.toml"], ['"/no/such.toml"', "No such file", "invalid argument"]),
        (["--runtime-config-path", "/etc"], ['"/etc"', "not a regular file"]),
        (["--annotation", "io.katacontainers.config.hypervisor.path=/bin/sh"], ["path is not enabled"]),
        (["--annotation", "io.katacontainers.config.runtime.disable_guest_seccomp=perhaps"], ['"perhaps"']),
        (["--log-uri", "nonsense:///x"], ["scheme 'nonsense' is not supported", "fifo://"]),
        (["--log-uri", "binary:///no/such/logger"], ["'/no/such/logger' cannot be run", "No such file"]),
        (["--log-uri", "binary:///etc/passwd"], ["'/etc/passwd' cannot be run", "Permission denied"]),
        (["--log-uri", "file:///proc/no/log"], ["'/proc/no/log' cannot be opened"]),
        (["--log-uri", "relative"], ["'relative' is no absolute path"]),
        (
            ["--mount", "type=bind,src=/no/such,dst=/x,options=rbind"],
            ['"/no/such" does not exist on the host'],
        ),
        (["--mount", "type=ext4,src=/dev/vda,dst=/x"], ["(/x)", "ext4", '"/dev/vda"', "not implemented"]),
        (["--cwd", "relative"], ['process.cwd: got "relative"', "absolute path"]),
    ],
)
def test_a_client_that_asks_for_nonsense(
    containerd: Containerd, no_leaks: NoLeaks, flags: list[str], words: list[str]
) -> None:
    with no_leaks():
        sentence = sentence_of(containerd.run("true", flags=flags, timeout=LIMIT))
    for word in words:
        assert word in sentence


def without_process(spec: dict[str, Any]) -> None:
    del spec["process"]


def without_arguments(spec: dict[str, Any]) -> None:
    spec["process"]["args"] = []


def with_missing_root(spec: dict[str, Any]) -> None:
    spec["root"]["path"] = "/no/such/root"


def with_missing_namespace(spec: dict[str, Any]) -> None:
    for namespace in spec["linux"]["namespaces"]:
        if namespace["type"] == "network":
            namespace["path"] = "/no/such/netns"


def with_nameless_mount(spec: dict[str, Any]) -> None:
    spec["mounts"].append({"destination": "", "type": "tmpfs", "source": "t"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_process, ["config.json has no process to run"]),
        (without_arguments, ["process.args is empty"]),
        (with_missing_root, ["'/no/such/root' is no directory on the host"]),
        (with_missing_namespace, ["/no/such/netns", "No such file"]),
        (with_nameless_mount, [".destination is missing"]),
    ],
)
def test_a_spec_that_makes_no_sense(
    containerd: Containerd,
    tmp_path: Path,
    no_leaks: NoLeaks,
    spoil: Callable[[dict[str, Any]], None],
    words: list[str],
) -> None:
    unpack_image(tmp_path / "rootfs")
    spec: dict[str, Any] = json.loads(containerd.ctr("oci", "spec").stdout)
    spec["root"] = {"path": str(tmp_path / "rootfs")}
    spec["process"]["args"] = ["true"]
    spoil(spec)
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    fixed = [
        "run",
        "--rm",
        "--runtime",
        containerd.runtime.name,
        "--fifo-dir",
        f"{containerd.directory}/fifo",
    ]
    with no_leaks():
        result = containerd.ctr(
            *fixed, "--config", f"{tmp_path}/spec.json", containerd.new_id(), check=False, timeout=LIMIT
        )
        sentence = sentence_of(result)
    for word in words:
        assert word in sentence


# Requests, one after the other, to a shim with a container; {id} is the container's id.
REQUESTS: list[tuple[str, dict[str, Any], Code, str]] = [
    *(
        (name, {"id": "no-such"}, Code.NOT_FOUND, "no task 'no-such'")
        for name in ("State", "Start", "Delete", "Pids", "Pause", "Resume", "Kill", "ResizePty", "CloseIO")
    ),
    ("Wait", {"id": "no-such"}, Code.NOT_FOUND, "no task 'no-such'"),
    ("Stats", {"id": "no-such"}, Code.NOT_FOUND, "no task 'no-such'"),
    *(
        (name, {"id": "{id}", "exec_id": "nope"}, Code.NOT_FOUND, "no process 'nope' in container '{id}'")
        for name in ("State", "Start", "Delete", "Kill", "ResizePty", "CloseIO", "Wait")
    ),
    ("Exec", {"id": "{id}"}, Code.INVALID_ARGUMENT, "the exec id is empty"),
    ("Exec", {"id": "{id}", "exec_id": "e"}, Code.INVALID_ARGUMENT, "is not JSON"),
    ("Update", {"id": "{id}"}, Code.INVALID_ARGUMENT, "expected LinuxResources"),
    ("Kill", {"id": "{id}", "signal": 99}, Code.INVALID_ARGUMENT, "there is no signal 99"),
    ("Resume", {"id": "{id}"}, Code.FAILED_PRECONDITION, "cannot be resumed"),
    ("Start", {"id": "{id}"}, Code.FAILED_PRECONDITION, "cannot be started"),
    ("Delete", {"id": "{id}"}, Code.FAILED_PRECONDITION, "cannot be deleted"),
    ("Checkpoint", {"id": "{id}"}, Code.UNIMPLEMENTED, "not supported"),
    ("Create", {"id": "{id}", "bundle": "{bad}"}, Code.ALREADY_EXISTS, "{id}"),
    ("Create", {"id": "../x"}, Code.INVALID_ARGUMENT, 'task id "../x"'),
    ("Create", {"id": "other"}, Code.INVALID_ARGUMENT, "bundle '' is no absolute path"),
    (
        "Create",
        {"id": "other", "bundle": "/no/such"},
        Code.INVALID_ARGUMENT,
        "bundle '/no/such' is no directory",
    ),
    ("Create", {"id": "other", "bundle": "{bad}"}, Code.INVALID_ARGUMENT, "config.json is not JSON"),
]


async def test_requests_that_cannot_be_served(containerd: Containerd, shared: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"process": ')
    names = {"id": shared, "bad": str(tmp_path)}

    def named(value: object) -> Any:
        return value.format(**names) if isinstance(value, str) else value

    told = []
    async with trio.open_nursery() as nursery:
        client = Client(await trio.open_unix_socket(str(shim_socket(containerd, shared))))
        nursery.start_soon(client.run)
        for name, fields, _, _ in REQUESTS:
            request = TASK[name].request_class(**{key: named(value) for key, value in fields.items()})
            with pytest.raises(StatusError) as refused:
                await client.call(TASK[name], request, timeout=LIMIT)
            told.append(refused.value.status)
        nursery.cancel_scope.cancel()
    for (name, fields, code, words), status in zip(REQUESTS, told, strict=True):
        assert status.code == code, (name, fields, status)
        assert named(words) in status.message, (name, fields, status)
        assert UNREADABLE.search(status.message) is None, status
    assert containerd.exec(shared, "echo", "fine").stdout == b"fine\n"


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        (["/no/such/program"], [], ["/no/such/program", "No such file"]),
        (["/etc/passwd"], [], ["Permission denied"]),
        (["true"], ["--cwd", "/no/such/directory"], ["/no/such/directory", "No such file"]),
        (["true"], ["--cwd", "relative"], ['process.cwd: got "relative"']),
    ],
)
def test_an_exec_that_cannot_run(
    containerd: Containerd, shared: str, command: list[str], flags: list[str], words: list[str]
) -> None:
    sentence = sentence_of(containerd.exec(shared, *command, flags=flags, timeout=LIMIT))
    for word in words:
        assert word in sentence
