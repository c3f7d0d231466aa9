"""The question, asked again and again, whether a guest still serves, and what it means that no answer comes.

The death of a VMM is noticed by itself. A guest that hangs dies of nothing: its processes seem to run, and
whoever waits for them waits for ever. The rule: only silence condemns. An agent that answers anything is
alive, a VM that is paused is not asked, and silence while this very process was not running proves nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum

import trio

from vc.errors import GuestGone, Timeout, VCError

LATENESS = 1.0  # seconds beyond the limit after which it was us who did not run: stopped, or starved


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """How often to ask, and how long an answer may take, in seconds. An interval of 0 asks never."""

    interval: float
    timeout: float


class Verdict(Enum):
    """What one question has shown."""

    ALIVE = "alive"
    UNKNOWN = "unknown"
    HUNG = "hung"


def judge(check: HealthCheck, *, answered: bool, waited: float, paused: bool) -> Verdict:
    """Say what a question has shown after `waited` seconds. `paused`: the VM is, or was meanwhile. Pure."""
    if answered:
        return Verdict.ALIVE
    if paused or waited > check.timeout + LATENESS:
        return Verdict.UNKNOWN
    return Verdict.HUNG


async def wait_hung(
    check: HealthCheck, ask: Callable[[float], Awaitable[None]], paused: Callable[[], bool]
) -> str | None:
    """Ask until no answer comes; return the cause as a sentence, or None if the guest ended otherwise.

    `ask` is given the time that an answer may take. It raises Timeout if there is none, GuestGone if there
    is nobody to ask, and any other VCError for an answer that is an error.
    """
    if not check.interval:
        return None
    while True:
        await trio.sleep(check.interval)
        if paused():
            continue
        asked = trio.current_time()
        answered = True
        try:
            await ask(check.timeout)
        except Timeout:
            answered = False
        except GuestGone:
            return None
        except VCError:
            pass
        waited = trio.current_time() - asked
        if judge(check, answered=answered, waited=waited, paused=paused()) is Verdict.HUNG:
            return (
                f"the guest hangs: its agent did not answer a health check within {check.timeout:g} s "
                "(health_check_timeout)"
            )
