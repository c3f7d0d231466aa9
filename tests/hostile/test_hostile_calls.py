"""A guest whose agent answers a call wrongly, or not: the call fails in time and in harmless words.

Each misbehaviour is tried on each call on the way to a running container, and on each call on the way back.
"""

from __future__ import annotations

import pytest

from protos.kata import agent_pb2, health_pb2
from protos.ttrpc import ttrpc_pb2
from tests.harness.hostile import Agent, Answer, Call, Host, never
from ttrpc.frames import DATA, HEADER, MAX_DATA_LENGTH, REQUEST, RESPONSE, encode_frame

MIB = 1 << 20
TEXT_LIMIT = 6000  # characters of an error, with what the host puts around the guest's words
TYPE = "io.kubernetes.cri.container-type"
SANDBOX_ID = "io.kubernetes.cri.sandbox-id"
EVIL = "\x1b[2J\x1b]0;owned\x07\r\n\u202e\u2028\x9b31m\0"


async def hang_up(call: Call) -> None:
    await call.stream.aclose()


async def truncate(call: Call) -> None:
    await call.raw(HEADER.pack(1000, call.stream_id, RESPONSE, 0) + b"\x0a")
    await call.stream.aclose()


async def answer_too_much(call: Call) -> None:
    await call.raw(HEADER.pack(MAX_DATA_LENGTH + 1, call.stream_id, RESPONSE, 0) + bytes(MIB))


async def announce_four_gigabytes(call: Call) -> None:
    await call.raw(HEADER.pack(0xFFFFFFFF, call.stream_id, RESPONSE, 0) + bytes(MIB))


async def answer_garbage(call: Call) -> None:
    await call.raw(encode_frame(call.stream_id, RESPONSE, 0, b"\xff" * 1000))


async def answer_garbage_in_order(call: Call) -> None:
    await call.send(ttrpc_pb2.Response(payload=b"\xff" * 1000))


async def answer_as_a_stream(call: Call) -> None:
    await call.raw(encode_frame(call.stream_id, DATA, 1, call.default().SerializeToString()))


async def fail_with_no_code(call: Call) -> None:
    await call.fail(2**31 - 1, EVIL)


async def fail_with_a_negative_code(call: Call) -> None:
    await call.fail(-(2**31), "")


async def fail_at_length(call: Call) -> None:
    await call.fail(3, EVIL + "x" * (MAX_DATA_LENGTH - 1000))


ONCE: list[Answer] = [hang_up, truncate, answer_too_much, announce_four_gigabytes, answer_garbage,
                      answer_garbage_in_order, answer_as_a_stream, fail_with_no_code,
                      fail_with_a_negative_code, fail_at_length]  # fmt: skip
# One of each kind: the connection ends, is of no more use, is not of ttrpc, is of no message, and a status.
FEW: list[Answer] = [
    hang_up,
    announce_four_gigabytes,
    answer_garbage,
    answer_garbage_in_order,
    fail_at_length,
]


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


def is_harmless(text: str) -> bool:
    return text.isprintable() and 0 < len(text) < TEXT_LIMIT


@pytest.mark.parametrize("misbehaviour", ONCE, ids=name_of)
@pytest.mark.parametrize("name", ["Check", "CreateContainer"])
async def test_create_fails_with_the_call_that_the_guest_answers_wrongly(
    host: Host, name: str, misbehaviour: Answer
) -> None:
    async with host.guest(Agent(answers={name: misbehaviour})) as shim:
        refusal = await shim.refusal("Create", **shim.creation())
        assert is_harmless(refusal.message), refusal.message[:1000]
        assert (await shim.refusal("State", id="c1")).code == 5


@pytest.mark.parametrize("misbehaviour", FEW, ids=name_of)
async def test_start_fails_and_the_task_can_be_deleted(host: Host, misbehaviour: Answer) -> None:
    async with host.guest(Agent(answers={"StartContainer": misbehaviour})) as shim:
        await shim.call("Create", **shim.creation())
        refusal = await shim.refusal("Start", id="c1")
        assert is_harmless(refusal.message), refusal.message[:1000]
        assert (await shim.call("Delete", id="c1")).exit_status == 137
        (exited,) = await shim.until("/tasks/exit")
        assert exited.exit_status == 137


@pytest.mark.parametrize("misbehaviour", FEW, ids=name_of)
async def test_a_lost_exit_is_told_all_the_same(host: Host, misbehaviour: Answer) -> None:
    async with host.guest(Agent(answers={"WaitProcess": misbehaviour})) as shim:
        await shim.call("Create", **shim.creation())
        await shim.call("Start", id="c1")
        assert (await shim.call("Wait", id="c1")).exit_status in (137, 255)
        assert len(await shim.until("/tasks/exit")) == 1
        await shim.call("Delete", id="c1")


@pytest.mark.parametrize("misbehaviour", [*FEW, never], ids=name_of)
@pytest.mark.parametrize("name", ["DestroySandbox", "StatsContainer"])
async def test_no_answer_of_the_guest_stands_in_the_way_of_an_end(
    host: Host, name: str, misbehaviour: Answer
) -> None:
    async with host.guest(Agent(answers={name: misbehaviour})) as shim:
        await shim.call("Create", **shim.creation())
        await shim.call("Start", id="c1")
        await shim.call("Kill", id="c1", signal=9)
        assert (await shim.call("Wait", id="c1")).exit_status == 137
        await shim.call("Delete", id="c1")
        (exited,) = await shim.until("/tasks/exit")
        assert exited.exit_status == 137


async def test_a_container_that_the_guest_keeps_is_gone_from_the_host(host: Host) -> None:
    async with host.guest(Agent(answers={"RemoveContainer": never})) as shim:
        await shim.call("Create", **shim.creation())
        more = shim.creation(annotations={TYPE: "container", SANDBOX_ID: "c1"})
        await shim.call("Create", **{**more, "id": "c2"})
        with_both = shim.holds()
        await shim.call("Delete", id="c2")
        assert [thing for thing in with_both if "/c2" in thing]
        assert not [thing for thing in shim.holds() if "/c2" in thing]
        await shim.call("Delete", id="c1")


async def test_a_create_that_is_never_answered_is_a_timeout(host: Host) -> None:
    async with host.guest(Agent(answers={"CreateContainer": never})) as shim:
        refusal = await shim.refusal("Create", **shim.creation())
        assert refusal.code == 4 and "CreateContainer" in refusal.message


@pytest.mark.parametrize("answered", [True, False])
async def test_a_guest_that_does_not_end_what_is_killed_is_ended_itself(host: Host, answered: bool) -> None:
    """Clients wait for the exit without limit: such a task could not be deleted, by no command."""

    async def do_nothing(call: Call) -> None:
        if answered:
            await call.answer(call.default())

    async with host.guest(Agent(answers={"SignalProcess": do_nothing})) as shim:
        await shim.call("Create", **shim.creation())
        await shim.call("Start", id="c1")
        if answered:
            await shim.call("Kill", id="c1", signal=9)
        else:
            refusal = await shim.refusal("Kill", id="c1", signal=9)
            assert refusal.code == 4 and "SignalProcess" in refusal.message
        assert (await shim.call("Wait", id="c1")).exit_status == 137
        assert "the guest did not end container 'c1' within 30 s" in shim.log
        await shim.call("Delete", id="c1")


async def test_answers_to_requests_that_nobody_made_are_passed_over(host: Host) -> None:
    async def chatter(call: Call) -> None:
        empty = ttrpc_pb2.Response().SerializeToString()
        for stream_id in (0, 2, 99, 0xFFFFFFFE, 0xFFFFFFFF):
            for kind in (0, REQUEST, RESPONSE, DATA, 200):
                await call.raw(encode_frame(stream_id, kind, 0xFF, empty))
        await call.answer(call.default())
        await call.answer(call.default())
        await call.fail(13, "and again")

    names = ["Check", "GetGuestDetails", "CreateSandbox", "CreateContainer", "StartContainer"]
    agent = Agent(answers=dict.fromkeys(names, chatter))
    async with host.guest(agent) as shim:
        await shim.call("Create", **shim.creation())
        await shim.call("Start", id="c1")
        await shim.call("Kill", id="c1", signal=9)
        await shim.call("Wait", id="c1")
        await shim.call("Delete", id="c1")


async def test_a_guest_that_is_not_serving_did_not_boot(host: Host) -> None:
    async def refuse(call: Call) -> None:
        await call.answer(health_pb2.HealthCheckResponse(status=77))  # type: ignore[arg-type]

    async with host.guest(Agent(answers={"Check": refuse})) as shim:
        refusal = await shim.refusal("Create", **shim.creation())
        assert "does not serve (health status 77)" in refusal.message


async def test_a_megabyte_of_features_is_refused(host: Host) -> None:
    async def boast(call: Call) -> None:
        details = agent_pb2.AgentDetails(extra_features=["\x1b" * 10] * 90_000)
        await call.answer(agent_pb2.GuestDetailsResponse(agent_details=details))

    async with host.guest(Agent(answers={"GetGuestDetails": boast})) as shim:
        refusal = await shim.refusal("Create", **shim.creation())
        assert "GetGuestDetails" in refusal.message and "exceeds" in refusal.message


async def test_counters_are_bounded_in_number_and_told_as_they_are(host: Host) -> None:
    """A few bytes of an answer make many times as many in memory, and took the shim seconds to go through."""
    many = agent_pb2.StatsContainerResponse(network_stats=[agent_pb2.NetworkStats()] * 100_000)
    huge = agent_pb2.StatsContainerResponse()
    huge.cgroup_stats.cpu_stats.cpu_usage.total_usage = 2**64 - 1
    huge.cgroup_stats.memory_stats.stats["anon"] = 2**64 - 1
    answers = [many, huge]

    async def count(call: Call) -> None:
        await call.answer(answers[0])

    async with host.guest(Agent(answers={"StatsContainer": count})) as shim:
        await shim.call("Create", **shim.creation())
        await shim.call("Start", id="c1")
        refusal = await shim.refusal("Stats", id="c1")
        assert "StatsContainer" in refusal.message and is_harmless(refusal.message)
        answers.pop(0)
        assert (await shim.call("Stats", id="c1")).stats.value
        await shim.call("Kill", id="c1", signal=9)
        await shim.call("Wait", id="c1")
        await shim.call("Delete", id="c1")
