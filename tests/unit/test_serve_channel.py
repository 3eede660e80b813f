"""The way from gateways to replicas over real sockets: calls, cancelling, losing, leaving, secrets, slow readers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import msgpack
import numpy as np
import pytest
import uvloop

from serve.channel import client, handshake, server
from serve.channel.client import Busy, CallFailed, Link, connect
from serve.channel.frames import Kind, Splitter, decode, encode
from serve.channel.handshake import Denied
from serve.channel.server import Server
from serve.routing.lost import ReplicaLost
from serve.wire import Chunk, GenerateCall, Identity, InferCall, Inferred, Opened
from tests.support.waiting import until

SECRET = b"s" * 32
ENDLESS = msgpack.packb([2, 0, msgpack.ExtType(2, msgpack.packb(["S0", [-1], b""]))])
"""An array of as many items as there are, each of no bytes: numpy divides by them."""
WAIT_S = 5.0


class Engine:
    """Answers: as many chunks as the call asks for; `hold` keeps back the rest of each stream after its first."""

    def __init__(self) -> None:
        self.open = 0
        self.begun = 0
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def answer(self, call: Any) -> AsyncGenerator[Any, None]:
        self.open += 1
        self.begun += 1
        try:
            if isinstance(call, InferCall):
                yield Inferred(Identity("1", None), [{"sum": call.inputs["x"].sum(axis=1)}])
                return
            if call.prompt == "fail":
                raise RuntimeError("inside")
            yield Opened(Identity("1", None), 1)
            for number in range(call.max_tokens or 0):
                await asyncio.sleep(0)
                yield Chunk(f"{call.request_id}:{number} ", number + 1, ids=(number,))
                await self.go_on.wait()
            yield Chunk("", call.max_tokens or 0, "stop")
        finally:
            self.open -= 1


def call(name: str, tokens: int = 3, prompt: str = "x") -> GenerateCall:
    return GenerateCall(name, prompt, max_tokens=tokens)


async def text_of(messages: AsyncGenerator[Any, None]) -> str:
    return "".join([each.text async for each in messages if isinstance(each, Chunk)])


def expected(name: str, tokens: int) -> str:
    return "".join(f"{name}:{number} " for number in range(tokens))


@asynccontextmanager
async def replica(slots: int = 64) -> Any:
    """A replica and one gateway's connection to it."""
    engine = Engine()
    at = Server("r1", slots, SECRET, engine.answer)
    link = await connect(await at.start("127.0.0.1"), SECRET, "r1", lambda: None)
    try:
        yield engine, at, link
    finally:
        link.close()
        engine.go_on.set()
        await at.close()


def run(scenario: Callable[[Engine, Server, Link], Awaitable[None]], slots: int = 64) -> None:
    async def inside() -> None:
        async with replica(slots) as parts:
            await scenario(*parts)

    asyncio.run(inside())
    uvloop.run(inside())  # what Ray Serve's replicas run on


def test_many_streams_over_one_connection_keep_apart() -> None:
    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        texts = await asyncio.gather(*(text_of(link.stream(call(f"c{n}", n % 7))) for n in range(100)))
        assert texts == [expected(f"c{n}", n % 7) for n in range(100)]
        assert (at.running, engine.open, len(at.peers)) == (0, 0, 1)

    run(scenario)


def test_arrays_go_in_and_out() -> None:
    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        inputs = {"x": np.arange(2_000_000, dtype=np.float32).reshape(2, -1)}
        (answer,) = [each async for each in link.stream(InferCall("r", inputs))]
        np.testing.assert_array_equal(answer.predictions[0]["sum"], inputs["x"].sum(axis=1))

    run(scenario)


def test_closing_a_stream_ends_its_work_and_no_other() -> None:
    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        engine.go_on.clear()
        closed, other = link.stream(call("a", 100)), link.stream(call("b", 2))
        for stream in (closed, other):
            await anext(stream)
        assert (at.running, engine.open) == (2, 2)
        await closed.aclose()
        await until(lambda: engine.open == 1)
        assert at.running == 1
        engine.go_on.set()
        assert await text_of(other) == expected("b", 2)

    run(scenario)


def test_a_connection_that_is_reset_is_a_lost_replica_in_every_stream() -> None:
    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        engine.go_on.clear()
        streams = [link.stream(call(f"c{n}", 5)) for n in range(20)]
        for stream in streams:
            await anext(stream)
        (peer,) = at.peers
        peer._transport.abort()
        for stream in streams:
            with pytest.raises(ReplicaLost) as lost:
                await text_of(stream)
            assert (lost.value.replica_id, lost.value.moved) == ("r1", False)
        with pytest.raises(ReplicaLost):
            await anext(link.stream(call("late")))
        await until(lambda: engine.open == 0)

    run(scenario)


def test_a_gateway_that_goes_away_frees_what_it_held() -> None:
    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        engine.go_on.clear()
        stream = link.stream(call("a", 100))
        await anext(stream)
        link.close()
        await until(lambda: engine.open == 0 and not at.peers)
        with pytest.raises(ReplicaLost):
            await text_of(stream)

    run(scenario)


def test_code_that_fails_fails_its_own_call_and_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        with pytest.raises(CallFailed):
            await text_of(link.stream(call("bad", prompt="fail")))
        assert await text_of(link.stream(call("good", 1))) == "good:0 "

    run(scenario)
    assert "request bad failed" in caplog.text
    assert "RuntimeError: inside" in caplog.text


def test_an_answer_that_cannot_be_sent_fails_its_own_call(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(call: Any) -> AsyncGenerator[Any, None]:
        yield Inferred(Identity("1", None), [{"x": {1, 2}}])

    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        at.answer = answer
        with pytest.raises(CallFailed):
            await anext(link.stream(call("bad")))

    run(scenario)
    assert "a builtins.set cannot be sent" in caplog.text


def test_more_than_it_takes_is_sent_back() -> None:
    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        engine.go_on.clear()
        streams = [link.stream(call(f"c{n}", 2)) for n in range(at.most)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(Busy):
            await anext(link.stream(call("more")))
        engine.go_on.set()
        assert await text_of(streams[0]) == expected("c0", 2)
        assert await text_of(link.stream(call("again", 1))) == "again:0 "

    run(scenario, slots=4)


def test_a_gateway_hears_what_a_replica_does_for_others() -> None:
    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        engine.go_on.clear()
        other = await connect(at.address, SECRET, "r1", lambda: None)
        stream = other.stream(call("a", 2))
        await anext(stream)
        await until(lambda: link.others == 1)
        assert other.others == 0
        other.close()
        await until(lambda: link.others == 0)
        await stream.aclose()

    run(scenario)


# -- leaving ---------------------------------------------------------------------------------------------------------


def test_what_a_gateway_that_did_not_read_was_not_told_it_is_told_when_it_reads() -> None:
    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        engine.go_on.clear()
        (reads_not,) = at.peers
        other = await connect(at.address, SECRET, "r1", lambda: None)
        stream = other.stream(call("a", 3))
        await anext(stream)
        await until(lambda: link.others == 1)
        reads_not.pause_writing()
        await stream.aclose()
        await until(lambda: at.running == 0 and at._telling is None)
        at.refuse_more()
        await asyncio.sleep(0.01)
        assert (link.others, link.leaving) == (1, False)
        reads_not.resume_writing()
        await until(lambda: (link.others, link.leaving) == (0, True))
        other.close()

    run(scenario)


def test_one_that_leaves_finishes_what_runs_and_gives_back_what_comes() -> None:
    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        engine.go_on.clear()
        running = link.stream(call("old", 4))
        await anext(running)
        leaving = asyncio.create_task(at.leave(WAIT_S))
        await until(lambda: link.leaving)
        with pytest.raises(ReplicaLost) as lost:
            await anext(link.stream(call("new")))
        assert (lost.value.replica_id, lost.value.moved) == ("r1", True)
        engine.go_on.set()
        assert await text_of(running) == expected("old", 4)
        await leaving
        await until(lambda: link.lost)

    run(scenario)


def test_what_does_not_end_in_time_is_given_back_after_all_that_it_said() -> None:
    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        engine.go_on.clear()
        stream = link.stream(call("long", 10))
        await anext(stream)
        await at.leave(0.01)
        assert engine.open == 0
        assert (await anext(stream)).text == "long:0 "
        with pytest.raises(ReplicaLost) as lost:
            await anext(stream)
        assert lost.value.moved

    run(scenario)


def test_one_without_work_leaves_at_once() -> None:
    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        await asyncio.wait_for(at.leave(60), WAIT_S)
        with pytest.raises(OSError, match="onnect"):
            await connect(at.address, SECRET, "r1", lambda: None)

    run(scenario)


# -- strangers, and those that do not read ---------------------------------------------------------------------------


def test_a_wrong_secret_opens_nothing() -> None:
    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        with pytest.raises(OSError):  # noqa: PT011  # closed without a word
            await connect(at.address, b"t" * 32, "r1", lambda: None)
        assert len(at.peers) == 1

    run(scenario)


def test_one_that_knows_no_secret_learns_none_and_gets_no_calls() -> None:
    """Somebody else listens where a replica was: what gateways send it is of no use to it."""
    heard = b""

    async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        writer.write(encode(Kind.HELLO, 0, [handshake.VERSION, b"n" * 16]))
        heard += await reader.read(4096)
        writer.write(encode(Kind.WELCOME, 0, [b"p" * 32, 8, False]))
        heard += await reader.read(4096)
        writer.close()

    async def inside() -> None:
        listening = await asyncio.start_server(stranger, "127.0.0.1", 0)
        host, port = listening.sockets[0].getsockname()
        with pytest.raises(Denied, match="secret"):
            await connect(f"{host}:{port}", SECRET, "r1", lambda: None)
        listening.close()

    asyncio.run(inside())
    (body,) = Splitter().feed(heard)
    assert decode(body).kind == Kind.PROOF
    assert SECRET not in heard


def test_one_in_between_gets_no_call_by_the_proofs_of_another_replica() -> None:
    """Somebody listens where r1 was, hands all on to r2, which lives, and puts r1's name into what comes back."""

    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        other = Server("r2", 8, SECRET, engine.answer)
        address = await other.start("127.0.0.1")
        heard = [b"", b""]

        async def relayed(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                while data := await reader.read(65536):
                    heard[number] += data
                    writer.write(data)
            writer.close()

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            on_reader, on_writer = await asyncio.open_connection(*address.split(":"))
            await asyncio.gather(relayed(0, reader, on_writer), relayed(1, on_reader, writer))

        listening = await asyncio.start_server(relay, "127.0.0.1", 0)
        host, port = listening.sockets[0].getsockname()
        with pytest.raises((OSError, Denied)):
            await connect(f"{host}:{port}", SECRET, "r1", lambda: None)
        assert [[decode(body).kind for body in Splitter().feed(each)] for each in heard] == [[Kind.PROOF], [Kind.HELLO]]
        through = await connect(f"{host}:{port}", SECRET, "r2", lambda: None)  # the one that it really is
        assert await text_of(through.stream(call("b", 1))) == "b:0 "
        through.close()
        listening.close()
        await other.close()

    run(scenario)


@pytest.mark.parametrize("end", ["gateway", "replica"])
def test_a_proof_is_of_one_end_one_replica_and_both_nonces(end: str) -> None:
    said = handshake.proof(SECRET, end, "r1", b"a", b"b")
    others = [("r1", b"a", b"c"), ("r1", b"b", b"a"), ("r2", b"a", b"b"), ("r1a", b"", b"b"), ("r1", b"ab", b"")]
    different = {handshake.proof(SECRET, end, *each) for each in others}
    different |= {handshake.proof(SECRET, "nobody", "r1", b"a", b"b"), handshake.proof(b"t", end, "r1", b"a", b"b")}
    assert len(different | {said}) == 8


@pytest.mark.parametrize(
    "first",
    [b"GET / HTTP/1.1\r\n\r\n", encode(Kind.CALL, 1, call("x")), encode(Kind.PING), b"\xff\xff\xff\xff",
     encode(Kind.PROOF, 0, [handshake.VERSION, b"n", b"p"]), encode(Kind.PROOF, 0, ["0:old", b"n", b"p"]),
     len(ENDLESS).to_bytes(4, "big") + ENDLESS],
    ids=["http", "call", "ping", "huge", "wrong proof", "other version", "endless array"],
)  # fmt: skip
def test_a_stranger_is_cut_and_reaches_no_engine(first: bytes) -> None:
    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        reader, writer = await asyncio.open_connection(*at.address.split(":"))
        await reader.readexactly(4)
        writer.write(first + encode(Kind.CALL, 2, call("x")))
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await asyncio.wait_for(reader.readexactly(1 << 20), WAIT_S)
        writer.close()
        assert (engine.begun, len(at.peers)) == (0, 1)

    run(scenario)


def test_one_that_says_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_S", 0.02)

    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        reader, writer = await asyncio.open_connection(*at.address.split(":"))
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await asyncio.wait_for(reader.readexactly(1 << 20), WAIT_S)
        writer.close()
        assert at.peers == {peer for peer in at.peers if peer._known}

    run(scenario)


def test_spoilt_bytes_end_the_connection_and_not_the_replica() -> None:
    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        assert link._transport is not None
        link._transport.write(b"\x00\x00\x00\x01\xc1")
        await until(lambda: link.lost)
        again = await connect(at.address, SECRET, "r1", lambda: None)
        assert await text_of(again.stream(call("b", 1))) == "b:0 "
        again.close()

    run(scenario)


def test_a_gateway_that_does_not_read_is_not_written_to_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made for it stays bounded: its streams stop, and others go on."""
    monkeypatch.setattr(server, "SLOW_S", 0.3)
    made = 0

    async def endless(call: Any) -> AsyncGenerator[Any, None]:
        nonlocal made
        while True:
            await asyncio.sleep(0)
            made += 1
            yield Chunk("x" * 100_000, 1)

    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        answer, at.answer = at.answer, endless
        assert link._transport is not None
        stream = link.stream(call("a"))
        await anext(stream)
        link._transport.pause_reading()
        (peer,) = at.peers
        await until(lambda: not peer._may_write.is_set())
        stopped_at = made
        at.answer = answer
        other = await connect(at.address, SECRET, "r1", lambda: None)
        assert await text_of(other.stream(call("b", 1))) == "b:0 "
        assert made <= stopped_at + 1
        await until(lambda: peer not in at.peers)
        other.close()
        await stream.aclose()

    run(scenario)


def test_one_that_is_silent_is_found_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PING_S", 0.02)
    monkeypatch.setattr(client, "SILENT_S", 0.1)
    monkeypatch.setattr(client, "GONE_S", 0.4)

    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        (peer,) = at.peers
        await asyncio.sleep(0.15)
        assert link.responsive
        peer._transport.pause_reading()  # as if its event loop hung
        await until(lambda: not link.responsive)
        peer._transport.resume_reading()
        await until(lambda: link.responsive)
        peer._transport.pause_reading()
        await until(lambda: link.lost)

    run(scenario)


def test_a_gateway_that_is_gone_without_a_word_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PING_S", 0.02)
    monkeypatch.setattr(server, "GONE_S", 0.1)

    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        engine.go_on.clear()
        stream = link.stream(call("a", 5))
        await anext(stream)
        await asyncio.sleep(0.25)
        assert at.running == 1
        assert link._pinging is not None
        link._pinging.cancel()  # as if its machine were off
        await until(lambda: not at.peers and engine.open == 0)
        await stream.aclose()

    run(scenario)


def test_what_a_reader_did_not_take_comes_as_one() -> None:
    async def scenario(engine: Engine, at: Server, link: Link) -> None:
        stream = link.stream(call("a", 500))
        await anext(stream)
        await until(lambda: at.running == 0)
        (mailbox,) = link._streams.values()
        await until(lambda: mailbox.ended)
        assert len(mailbox._messages) <= 64
        async with aclosing(stream):
            chunk = await anext(stream)
        assert (chunk.text, chunk.ids) == (expected("a", 500), tuple(range(500)))
        assert (chunk.completion_tokens, chunk.finish_reason) == (500, "stop")

    run(scenario)
