"""The timeline of a start: who writes it, who inherits it, and that it stays small."""

import time

import trio

from vc import timeline
from vc.timeline import MAX_MARKS, Timeline


def test_marks_are_told_in_the_order_of_their_steps_with_the_seconds_since_the_beginning() -> None:
    began = time.monotonic() - 10.0
    line = Timeline(began)
    line.mark("one")
    line.mark("two")
    assert list(line.marks()) == ["one", "two"]
    assert 10.0 <= line.marks()["one"] <= line.marks()["two"]
    assert str(line).startswith(f"since {began:.3f}: one 10.0")


def test_a_second_container_does_not_rewrite_the_start_of_the_first() -> None:
    line = Timeline()
    line.mark("container created")
    first = line.marks()
    line.mark("container created")
    assert line.marks() == first


def test_a_timeline_does_not_grow_without_bound() -> None:
    line = Timeline()
    for number in range(2 * MAX_MARKS):
        line.mark(str(number))
    assert len(line.marks()) == MAX_MARKS


async def test_tasks_and_threads_write_into_the_timeline_of_who_started_them() -> None:
    async def start(name: str) -> dict[str, float]:
        line = Timeline()
        timeline.begin(line)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_mark_in_a_task, f"{name} task")
            await trio.to_thread.run_sync(timeline.mark, f"{name} thread")
        return line.marks()

    found: list[set[str]] = []

    async def keep(name: str) -> None:
        found.append(set(await start(name)))

    async with trio.open_nursery() as nursery:
        for name in ("a", "b"):
            nursery.start_soon(keep, name)
    assert sorted(found, key=min) == [{"a task", "a thread"}, {"b task", "b thread"}]


async def _mark_in_a_task(name: str) -> None:
    await trio.lowlevel.checkpoint()
    timeline.mark(name)


def test_a_step_of_nobodys_start_is_marked_nowhere() -> None:
    timeline.mark("stray")
    assert timeline.current() is None
