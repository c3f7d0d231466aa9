"""When a guest is taken for hung, and when not."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from vc.errors import AgentError, GuestGone, Timeout
from vc.monitor import LATENESS, HealthCheck, Verdict, judge, wait_hung

CHECK = HealthCheck(interval=10.0, timeout=30.0)


class Guest:
    """Answers one health check after another as it is told; then none any more."""

    def __init__(self, *answers: Exception | float) -> None:
        self._answers = list(answers)
        self.asked: list[float] = []  # when, in seconds

    async def ask(self, timeout: float) -> None:
        self.asked.append(trio.current_time())
        answer = self._answers.pop(0) if self._answers else float("inf")
        if isinstance(answer, Exception):
            raise answer
        with trio.move_on_after(timeout) as limit:
            await trio.sleep(answer)
        if limit.cancelled_caught:
            raise Timeout("no answer")


def never() -> bool:
    return False


@pytest.mark.parametrize(
    ("answered", "waited", "paused", "verdict"),
    [
        (True, 0.1, False, Verdict.ALIVE),
        (True, 29.9, True, Verdict.ALIVE),
        (False, 30.0, False, Verdict.HUNG),
        (False, 30.0 + LATENESS, False, Verdict.HUNG),
        (False, 30.0, True, Verdict.UNKNOWN),
        (False, 300.0, False, Verdict.UNKNOWN),  # we were stopped: the answer may lie in the socket
    ],
)
def test_only_silence_while_both_sides_could_speak_condemns(
    answered: bool, waited: float, paused: bool, verdict: Verdict
) -> None:
    assert judge(CHECK, answered=answered, waited=waited, paused=paused) is verdict


@given(st.floats(0, 1e6), st.booleans(), st.floats(0.1, 1e5))
def test_a_guest_that_answers_is_never_hung(waited: float, paused: bool, timeout: float) -> None:
    check = HealthCheck(1.0, timeout)
    assert judge(check, answered=True, waited=waited, paused=paused) is Verdict.ALIVE


async def test_a_guest_that_falls_silent_is_hung_after_interval_and_timeout(
    autojump_clock: MockClock,
) -> None:
    guest = Guest(0.5, 29.0)  # slow is not dead
    began = trio.current_time()
    cause = await wait_hung(CHECK, guest.ask, never)
    assert cause is not None
    assert "did not answer a health check within 30 s" in cause
    assert [round(at - began, 3) for at in guest.asked] == [10.0, 20.5, 59.5]
    assert trio.current_time() - began == pytest.approx(59.5 + 30)


async def test_an_answer_that_is_an_error_is_an_answer(autojump_clock: MockClock) -> None:
    guest = Guest(AgentError("Check", 12, "no such service"), 0.0)
    assert await wait_hung(CHECK, guest.ask, never) is not None
    assert len(guest.asked) == 3


async def test_a_guest_that_has_ended_is_not_hung(autojump_clock: MockClock) -> None:
    guest = Guest(0.0, GuestGone("QEMU was killed"))
    assert await wait_hung(CHECK, guest.ask, never) is None


async def test_a_paused_vm_is_not_asked_and_a_pause_excuses_silence(autojump_clock: MockClock) -> None:
    paused = trio.Event()
    guest = Guest()
    causes: list[str | None] = []

    async def watch(ask: Callable[[float], Awaitable[None]]) -> None:
        causes.append(await wait_hung(CHECK, ask, lambda: paused.is_set()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, guest.ask)
        await trio.sleep(CHECK.interval + 1)  # the first question is out
        paused.set()
        await trio.sleep(1000)
        assert (len(guest.asked), causes) == (1, [])
        paused = trio.Event()
        await trio.sleep(CHECK.interval + CHECK.timeout + 1)
        assert len(causes) == 1


async def test_an_interval_of_zero_asks_never() -> None:
    assert await wait_hung(HealthCheck(0.0, 30.0), Guest().ask, never) is None
