"""Create, over a real socket: what becomes of the request, and what is left of one that fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from protos.containerd import task_v2_pb2, types_pb2
from tests.shim.pods import PID, TASK, Gate, Shim
from ttrpc.client import Client
from ttrpc.status import Code
from vc.errors import AgentError, HypervisorError, InvalidArgument
from vc.process import StdioRequest
from vc.storage.mounts import Mount


async def test_the_sandbox_is_made_of_the_spec_and_the_namespace(shim: Shim) -> None:
    await shim.call("Create", id="c1", bundle=shim.bundle("c1", hostname="h1"))
    spec = shim.sandboxes[0].spec
    assert (spec.id, spec.hostname, spec.netns) == ("ns--c1", "h1", "/run/netns/x")
    assert (shim.bundles / "c1" / "run-dir").read_text() == str(shim.bundles / "run")
    assert (shim.bundles / "c1" / "init.pid").read_text() == str(PID)


async def test_the_root_is_where_the_mounts_go_or_where_the_spec_says(shim: Shim) -> None:
    await shim.call(
        "Create",
        id="c1",
        bundle=shim.bundle("c1"),
        rootfs=[types_pb2.Mount(type="bind", source="/x", options=["rbind", "ro"])],
    )
    given = shim.container().given
    assert given["rootfs"] == shim.bundles / "c1" / "rootfs"
    assert given["rootfs_mounts"] == (Mount("bind", "/x", "", ("rbind", "ro")),)
    await shim.call("Delete", id="c1")
    docker = shim.bundles / "docker"
    docker.mkdir()
    await shim.call("Create", id="c2", bundle=shim.bundle("c2", root={"path": str(docker)}))
    assert shim.container("c2").given["rootfs"] == docker


async def test_a_missing_root_is_refused_before_there_is_a_sandbox(shim: Shim) -> None:
    """It cost a boot before it was refused."""
    refused = await shim.fails("Create", id="c1", bundle=shim.bundle("c1", root={"path": "/no/such/root"}))
    assert refused.code == Code.INVALID_ARGUMENT
    assert "root '/no/such/root' is no directory" in refused.message
    assert not shim.sandboxes


async def test_a_root_with_mapped_owners_is_refused_before_there_is_a_sandbox(shim: Shim) -> None:
    """containerd 2 orders it for a user namespace; it cost a boot, and the kernel gave no reason."""
    mapped = types_pb2.Mount(type="overlay", source="overlay", options=["index=off", "uidmap=0:100000:1000"])
    refused = await shim.fails("Create", id="c1", bundle=shim.bundle("c1"), rootfs=[mapped])
    assert refused.code == Code.UNIMPLEMENTED
    assert "run the container without a user namespace" in refused.message
    assert not shim.sandboxes


async def test_the_request_decides_about_the_terminal(shim: Shim) -> None:
    await shim.create(terminal=True)
    assert shim.container().spec["process"]["terminal"] is True
    assert shim.container().given["stdio"] == StdioRequest(stdout=True, terminal=True)


async def test_a_failed_create_leaves_nothing_and_the_shim_ends_at_shutdown(shim: Shim) -> None:
    async def refuse(spec: object) -> None:
        raise HypervisorError("qemu: cannot allocate memory")

    shim.open_hook = refuse
    error = await shim.fails("Create", id="c1", bundle=shim.bundle("c1"))
    assert (error.code, "cannot allocate memory" in error.message) == (Code.INTERNAL, True)
    assert (await shim.fails("State", id="c1")).code is Code.NOT_FOUND
    assert (await shim.fails("Delete", id="c1")).code is Code.NOT_FOUND
    await shim.call("Shutdown", id="c1")
    with trio.fail_after(10):
        await shim.ended.wait()
    assert shim.events == []


async def test_a_create_that_fails_in_the_guest_ends_the_sandbox_and_can_be_repeated(shim: Shim) -> None:
    async def refuse(container_id: str) -> None:
        raise AgentError("CreateContainer", 13, "no such layer")

    shim.prepare = lambda sandbox: setattr(sandbox, "create_hook", refuse)
    error = await shim.fails("Create", id="c1", bundle=shim.bundle("c1"))
    assert "no such layer" in error.message
    assert not shim.sandboxes[0].open
    shim.prepare = lambda sandbox: None
    await shim.create()
    assert [sandbox.open for sandbox in shim.sandboxes] == [False, True]


async def test_state_says_not_found_and_does_not_wait_while_a_create_is_under_way(shim: Shim) -> None:
    opening = Gate()
    shim.open_hook = opening
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shim.create)
        await opening.reached.wait()
        assert (await shim.fails("State", id="c1")).code is Code.NOT_FOUND
        assert (await shim.fails("Create", id="c1", bundle=shim.bundle("c1"))).code is Code.ALREADY_EXISTS
        await shim.call("Shutdown", id="c1")
        opening.opened.set()
    assert (await shim.call("State", id="c1")).status == 1


async def test_a_create_whose_client_is_gone_is_undone(shim: Shim) -> None:
    """A containerd that restarts during a Create never asks for that task again."""
    creating, undone = trio.Event(), trio.Event()

    async def hang(container_id: str) -> None:
        creating.set()
        try:
            await trio.sleep_forever()
        finally:
            undone.set()

    shim.prepare = lambda sandbox: setattr(sandbox, "create_hook", hang)
    async with trio.open_nursery() as nursery:
        other = Client(await trio.open_unix_socket(str(shim.socket)))
        nursery.start_soon(other.run)
        other.open_stream(TASK["Create"], task_v2_pb2.CreateTaskRequest(id="c1", bundle=shim.bundle("c1")))
        await creating.wait()
        await other.aclose()
        with trio.fail_after(10):
            await undone.wait()
    shim.prepare = lambda sandbox: None
    await shim.create("c2")
    assert [sandbox.open for sandbox in shim.sandboxes] == [False, True]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "config.json"),
        ("{", "not JSON"),
        ("[]", "object"),
        ('{"ociVersion": "1.0"}', "process"),
        (
            '{"process": {"args": ["a"]}, "annotations": {"io.kubernetes.cri.container-type": "x"}}',
            "container-type",
        ),
    ],
)
async def test_a_broken_bundle_is_an_invalid_argument_that_names_it(
    shim: Shim, content: str | None, word: str
) -> None:
    bundle = Path(shim.bundle("c1"))
    (bundle / "config.json").unlink()
    if content is not None:
        (bundle / "config.json").write_text(content)
    error = await shim.fails("Create", id="c1", bundle=str(bundle))
    assert error.code is Code.INVALID_ARGUMENT
    assert word in error.message
    assert shim.sandboxes == []


async def test_stdio_that_cannot_be_is_refused_before_a_vm_is_booted(shim: Shim, tmp_path: Path) -> None:
    for field_name, value in (
        ("stdout", "ftp://x/y"),
        ("stdin", str(tmp_path / "missing")),
        ("stdout", str(tmp_path / "missing")),
        ("stdout", "binary:///no/such/logger"),
    ):
        error = await shim.fails("Create", id="c1", bundle=shim.bundle("c1"), **{field_name: value})
        assert error.code is Code.INVALID_ARGUMENT
        assert value.rpartition("//")[2] in error.message
    assert shim.sandboxes == []


async def test_config_errors_reach_the_user(shim: Shim) -> None:
    async def refuse(spec: object) -> None:
        raise InvalidArgument("kernel '/no/vmlinux' does not exist")

    shim.open_hook = refuse
    error = await shim.fails("Create", id="c1", bundle=shim.bundle("c1"))
    assert error.code is Code.INVALID_ARGUMENT
    assert "/no/vmlinux" in error.message
