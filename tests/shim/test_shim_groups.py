"""Containers of one group share a shim and a sandbox: the first to come makes it, the last to go ends it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest
import trio

from shim import bundle
from tests.shim.bundles import Bundle, call, end
from tests.shim.pods import FakeContainer, Gate, Shim
from ttrpc.status import Code
from vc.errors import AgentError, InvalidArgument
from vc.oci.spec import GROUP_KEY, identify

GROUP = {GROUP_KEY: "g1"}


def test_start_knows_the_same_group_annotation_as_the_library() -> None:
    assert bundle.GROUP_KEY == GROUP_KEY


@pytest.mark.parametrize("order", list(permutations(("c1", "c2", "c3"))))
async def test_members_share_the_sandbox_and_the_last_one_ends_it(shim: Shim, order: tuple[str, ...]) -> None:
    for task_id in ("c1", "c2", "c3"):
        await shim.run(task_id, annotations=GROUP)
    assert [sandbox.id for sandbox in shim.sandboxes] == ["ns--g1"]
    for number, task_id in enumerate(order, start=1):
        await shim.call("Kill", id=task_id, signal=9)
        assert (await shim.call("Wait", id=task_id)).exit_status == 137
        for other in order[number:]:
            assert (await shim.call("State", id=other)).status == 2, "its neighbour's end is not its own"
        await shim.call("Delete", id=task_id)
        assert shim.sandboxes[0].open == (number < 3)
        assert shim.container(task_id).deleted == (number < 3)


async def test_members_that_come_at_once_make_one_sandbox(shim: Shim) -> None:
    opening = Gate()
    shim.open_hook = opening
    async with trio.open_nursery() as nursery:
        for task_id in ("c1", "c2", "c3"):
            nursery.start_soon(partial(shim.create, task_id, annotations=GROUP))
        await opening.reached.wait()
        opening.opened.set()
    assert len(shim.sandboxes) == 1
    assert set(shim.sandboxes[0].containers) == {"c1", "c2", "c3"}


async def test_members_that_leave_at_once_do_not_leave_the_sandbox_behind(shim: Shim) -> None:
    for task_id in ("c1", "c2"):
        await shim.create(task_id, annotations=GROUP)
    both = 0
    together = trio.Event()

    async def wait_for_the_other(_: FakeContainer) -> None:
        nonlocal both
        both += 1
        if both == 2:
            together.set()
        await together.wait()

    shim.sandboxes[0].delete_hook = wait_for_the_other
    async with trio.open_nursery() as nursery:
        for task_id in ("c1", "c2"):
            nursery.start_soon(partial(shim.call, "Delete", id=task_id))
    assert not shim.sandboxes[0].open


async def test_a_member_that_comes_while_the_last_one_goes_gets_a_new_sandbox(shim: Shim) -> None:
    await shim.create("c1", annotations=GROUP)
    ending = Gate()
    shim.sandboxes[0].end_hook = ending
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(shim.call, "Delete", id="c1"))
        await ending.reached.wait()
        nursery.start_soon(partial(shim.create, "c2", annotations=GROUP))
        ending.opened.set()
    assert [sandbox.open for sandbox in shim.sandboxes] == [False, True]
    assert (await shim.call("State", id="c2")).status == 1


async def test_a_member_that_cannot_be_created_leaves_the_others_alone(shim: Shim) -> None:
    async def refuse(container_id: str) -> None:
        if container_id != "c1":
            raise AgentError(Code.INTERNAL, "the guest says no")

    shim.prepare = lambda sandbox: setattr(sandbox, "create_hook", refuse)
    await shim.create("c1", annotations=GROUP)
    await shim.fails("Create", id="c2", bundle=shim.bundle("c2", annotations=GROUP))
    assert shim.sandboxes[0].open
    await shim.call("Delete", id="c1")
    await shim.fails("Create", id="c2", bundle=shim.bundle("c2", annotations=GROUP))
    assert [sandbox.open for sandbox in shim.sandboxes] == [False, False]


async def test_a_container_of_another_group_is_not_let_in(shim: Shim) -> None:
    await shim.create("c1", annotations=GROUP)
    for notes in ({GROUP_KEY: "g2"}, {}):
        error = await shim.fails("Create", id="c2", bundle=shim.bundle("c2", annotations=notes))
        assert error.code is Code.ALREADY_EXISTS
    assert shim.sandboxes[0].open


@pytest.mark.parametrize("name", ["", "../p", "a/b"])
def test_a_group_without_a_proper_name_is_an_error(name: str) -> None:
    with pytest.raises(bundle.BundleError, match="group"):
        bundle.group_of({GROUP_KEY: name}, "c1")
    with pytest.raises(InvalidArgument, match="group"):
        identify({GROUP_KEY: name}, "c1")


# `start` and `delete`


@pytest.fixture
def members(made: Bundle) -> Iterator[dict[str, Bundle]]:
    """Bundles of two members, in one directory as containerd makes them."""
    found = {}
    for task_id in ("c1", "c2"):
        path = made.path / task_id
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"annotations": GROUP}))
        found[task_id] = Bundle(path, made.sockets, made.log)
    yield found
    for member in found.values():
        if (member.path / "shim.pid").exists():
            end(member.pid(), signal.SIGKILL)


def start(members: dict[str, Bundle], task_id: str) -> bytes:
    return members[task_id].shim("start", stdin=members[task_id].bootstrap(task_id), task_id=task_id)


def delete(members: dict[str, Bundle], task_id: str) -> None:
    path = members[task_id].path
    members[task_id].shim("delete", "-bundle", str(path), task_id=task_id)
    pid = path / "shim.pid"
    if pid.exists():
        pid.rename(path.parent / "shim.pid")  # for the fixture, which ends what is left
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    del members[task_id]


@pytest.mark.parametrize("order", [("c1", "c2"), ("c2", "c1")])
async def test_the_second_member_finds_the_server_of_the_first_which_the_last_ends(
    members: dict[str, Bundle], order: tuple[str, str]
) -> None:
    address = start(members, "c1")
    pid = members["c1"].pid()
    assert start(members, "c2") == address
    assert not (members["c2"].path / "shim.pid").exists()
    path = Path(address.decode().removeprefix("unix://"))
    delete(members, order[0])
    await call(path, "Connect")
    # The server of a group that nobody is left of: a hung one, which holds its sandbox's lock.
    last = members[order[1]]
    left = last.sockets / "run" / "sbs" / "ns--g1"
    left.mkdir(parents=True)
    (left / "lock").touch()
    (last.path / "run-dir").write_text(str(last.sockets / "run"))
    delete(members, order[1])
    assert not left.exists()
    if order[1] == "c1":
        end(pid)
        assert not path.exists()


@pytest.mark.parametrize("order", [("c1", "c2"), ("c2", "c1")])
def test_what_a_killed_server_leaves_is_removed_by_whichever_member_comes_first(
    members: dict[str, Bundle], order: tuple[str, str]
) -> None:
    for task_id in ("c1", "c2"):
        start(members, task_id)
    end(members["c1"].pid(), signal.SIGKILL)
    left = members["c1"].sockets / "run" / "sbs" / "ns--g1"
    left.mkdir(parents=True)
    (left / "lock").touch()
    for member in members.values():
        (member.path / "run-dir").write_text(str(member.sockets / "run"))
    delete(members, order[0])
    assert not left.exists()
    delete(members, order[1])
