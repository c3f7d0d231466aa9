"""A guest that misbehaves on its line as it boots: Create fails in time, says why, and leaves nothing."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import pytest
import trio

from tests.harness.hostile import Agent, Host, shake_hands_and_serve
from yamux.frames import ACK, DATA, FIN, GO_AWAY, PING, SYN, WINDOW_UPDATE, encode_header
from yamux.resync import Responder

OnLine = Callable[[Agent, trio.SocketStream], Awaitable[None]]

FIRST = 1  # the id of the first stream that a host opens
MIB = 1 << 20


async def fails(host: Host, agent: Agent, *, config: str = "") -> str:
    """Have a Create that fails; return what its client is told."""
    async with host.guest(agent) as shim:
        refusal = await shim.refusal("Create", **shim.creation(config=config))
        assert agent.machine is not None
        assert refusal.message.isprintable()
        assert len(refusal.message) < 4000
        assert f"VM {agent.machine.vmid}" in refusal.message
        assert shim.events == []
    return refusal.message


# Without a session: only the limit of the boot ends it


async def say_nothing(agent: Agent, line: trio.SocketStream) -> None:
    await trio.sleep_forever()


async def flood(agent: Agent, line: trio.SocketStream) -> None:
    while True:
        await line.send_all(b"\xff" * MIB)


async def drip(agent: Agent, line: trio.SocketStream) -> None:
    """A byte at a time, and never the right one: worse than silence, if somebody waits anew for each."""
    while True:
        await line.send_all(b"\2")
        await trio.sleep(0.02)


async def answer_half(agent: Agent, line: trio.SocketStream) -> None:
    responder = Responder()
    while not responder.receive_data(bytes(await line.receive_some(4096))):
        pass
    await line.send_all(responder.data_to_send()[:-1])
    await trio.sleep_forever()


async def answer_another_nonce(agent: Agent, line: trio.SocketStream) -> None:
    await line.send_all(encode_header(PING, ACK, 0, 12345) + encode_header(PING, ACK, 0, ~12345 & 0xFFFFFFFF))
    await trio.sleep_forever()


async def hang_up_and_listen_again(agent: Agent, line: trio.SocketStream) -> None:
    """Each time the host comes, hang up in the middle of the answer."""
    await line.receive_some(1)


@pytest.mark.parametrize("behaviour", [say_nothing, flood, drip, answer_half, answer_another_nonce])
async def test_a_guest_that_does_not_shake_hands_did_not_boot(host: Host, behaviour: OnLine) -> None:
    text = await fails(host, Agent(on_line=behaviour), config="impatient.toml")
    assert "its agent does not answer" in text and "dial_timeout" in text


async def test_a_line_that_ends_in_the_handshake_is_the_end_of_the_vm(host: Host) -> None:
    text = await fails(host, Agent(on_line=hang_up_and_listen_again))
    assert re.search("did not boot after .*the VMM closed the serial line ", text)


async def test_garbage_before_the_handshake_is_thrown_away(host: Host) -> None:
    async def begin_with_garbage(agent: Agent, line: trio.SocketStream) -> None:
        await line.send_all(bytes(range(256)) * 4000)
        await shake_hands_and_serve(agent, line)

    agent = Agent(on_line=begin_with_garbage)
    async with host.guest(agent) as shim:
        await shim.call("Create", **shim.creation())
        await shim.call("Delete", id="c1")


# With a session that breaks the protocol, once the first stream is there

# Two things that are wrong at once; which one is seen first is a matter of how busy the host is.
ENDED = "closed instead of an answer|the serial line .* ended"
BREACHES = {
    "a version that there is none of": (b"\7" + bytes(11), "frame of version 7"),
    "an unknown type of frame": (encode_header(9, 0, FIRST, 0), "unknown type 9"),
    "more than the window": (encode_header(DATA, 0, FIRST, 64 * MIB), "whose credit is"),
    "data after the end": (
        encode_header(WINDOW_UPDATE, FIN, FIRST, 0) + encode_header(DATA, 0, FIRST, 5) + b"hello",
        ENDED,
    ),
    "two ends": (encode_header(WINDOW_UPDATE, FIN, FIRST, 0) * 2, ENDED),
    "a stream with an id of ours": (encode_header(WINDOW_UPDATE, SYN, 7, 0), "not the peer's to choose"),
    "stream number 0": (encode_header(WINDOW_UPDATE, SYN, 0, 0), "not the peer's to choose"),
    "an end by protocol error": (encode_header(GO_AWAY, 0, 0, 1), "GoAway 1"),
    "an end for no known reason": (encode_header(GO_AWAY, 0, 0, 0xFFFFFFFF), "GoAway 4294967295"),
    "half a frame": (encode_header(DATA, 0, FIRST, 100)[:5], "ended inside a frame"),
}


@pytest.mark.parametrize("breach", BREACHES)
async def test_a_breach_of_the_protocol_of_streams_is_the_end_of_the_vm(host: Host, breach: str) -> None:
    data, cause = BREACHES[breach]

    async def break_it(agent: Agent, stream: trio.abc.HalfCloseableStream, port: int) -> None:
        assert agent.line is not None
        await agent.line.send_all(data)
        await agent.line.send_eof()

    text = await fails(host, Agent(on_connect=break_it))
    assert "did not boot" in text
    assert re.search(cause, text)


FLOODS = {
    "pings": encode_header(PING, SYN, 0, 1),
    "answers to pings that nobody sent": encode_header(PING, ACK, 0, 1),
    "new streams": b"".join(encode_header(WINDOW_UPDATE, SYN, 2 * n, 0) for n in range(1, 2000)),
    "new streams full of data": b"".join(
        encode_header(DATA, SYN, 2 * n, 250_000) + bytes(250_000) for n in range(1, 257)
    ),
    "data for streams that are not there": encode_header(DATA, 0, 99, 1000) + bytes(1000),
    "ends of streams that are not there": encode_header(WINDOW_UPDATE, FIN, 99, 0),
    "wishes to say goodbye": encode_header(GO_AWAY, 0, 0, 0),
    "credit": encode_header(WINDOW_UPDATE, 0, FIRST, 0xFFFFFFFF),
}


@pytest.mark.parametrize("kind", FLOODS)
async def test_a_flood_of_frames_takes_no_memory_and_no_pod_with_it(host: Host, kind: str) -> None:
    """Opening streams once cost the host 64 MiB: it held what came for 256 that nobody was ever to accept."""
    frames = FLOODS[kind] * max(1, 4 * MIB // len(FLOODS[kind]))

    async def flood_once(agent: Agent, stream: trio.abc.HalfCloseableStream, port: int) -> None:
        assert agent.line is not None
        with trio.move_on_after(5):  # a host that has ended the session reads no more
            await agent.line.send_all(frames)
        await agent.line.aclose()

    async with host.guest(Agent(on_connect=flood_once)) as shim:
        refusal = await shim.refusal("Create", **shim.creation())
        assert "did not boot" in refusal.message


# With a session, but no way to the agent

ANSWERS = {
    "no newline": (b"x" * 100_000, "an answer of more than 256 bytes"),
    "control sequences": (b"ERR \x1b[2J\x07\x9b31m\xff\n", "refused: .*x1b"),
    "an end": (b"", "closed instead of an answer"),
    "nonsense": (b"\0\0\0\n", "refused"),
}


@pytest.mark.parametrize("answer", ANSWERS)
async def test_a_refused_port_is_told_in_harmless_words(host: Host, answer: str) -> None:
    data, cause = ANSWERS[answer]

    async def refuse(agent: Agent, stream: trio.abc.HalfCloseableStream, port: int) -> None:
        await stream.send_all(data)
        await stream.aclose()

    text = await fails(host, Agent(on_connect=refuse))
    assert re.search(cause, text)


async def test_a_port_that_is_never_answered_is_given_up(host: Host) -> None:
    async def stay_silent(agent: Agent, stream: trio.abc.HalfCloseableStream, port: int) -> None:
        await trio.sleep_forever()

    text = await fails(host, Agent(on_connect=stay_silent))
    assert "no answer within 10 s" in text
