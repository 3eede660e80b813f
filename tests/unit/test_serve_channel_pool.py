"""Which replica a gateway sends a call to, and how calls wait for one, over real connections, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

import httpx
import pytest
import uvloop

from serve.api import routes
from serve.api.body import ApiError
from serve.api.gateway import Gateway, ModelCard
from serve.channel import pool as pools
from serve.channel.pool import Full, NoReplica, Pool, VersionGone
from serve.channel.server import Server
from serve.deploy.backend import RayBackend
from serve.routing.choose import ByPrefix
from serve.routing.lost import ReplicaLost
from serve.wire import Chunk, GenerateCall, Identity, InferCall, Inferred, Load, Opened, Refused, ReplicaState
from tests.support.waiting import until

SECRET = b"s" * 32
WAIT_S = 5.0
CALL = GenerateCall("r", "x", max_tokens=1)


class Replica:
    """A replica that accepts every call and answers when it is let."""

    def __init__(
        self, name: str, version: str = "1", slots: int = 4, build: str | None = None, start_s: float = 0.0
    ) -> None:
        self.name, self.version, self.calls, self.start_s = name, version, 0, start_s
        self.build = build or f"build {version}"
        self.dies = self.breaks = self.stalls = False
        self.server = Server(name, slots, SECRET, self._answer)

    async def _answer(self, call: Any) -> AsyncGenerator[Any, None]:
        self.calls += 1
        if self.dies:
            for peer in self.server.peers:
                peer._transport.abort()
        if isinstance(call, InferCall) or call.prompt == "short":
            yield Inferred(Identity(self.version, None, self.build), [{"by": self.name}])
            return
        yield Opened(Identity(self.version, None, self.build), 1)
        if call.prompt == "two tokens":
            for number in range(len(call.generated), 2):
                if self.breaks and number == 1:
                    yield Refused(500, f"the engine of {self.name} failed", "engine_failed", lost=True)
                    return
                if self.stalls and number == 1:
                    await asyncio.sleep(3600)
                yield Chunk(self.name, number + 1, "stop" if number else None, ids=(number,))
            return
        await asyncio.sleep(3600)

    def state(self) -> ReplicaState:
        server = self.server
        return ReplicaState(
            *("m", self.name, self.version, Load(0, 0, 0.0), {}, server.address, server.slots, server.leaving),
            *(self.build, self.start_s),
        )


class Stage:
    """Replicas that run, and the pool that hears of them."""

    def __init__(self) -> None:
        self.pool = Pool("m", SECRET, ByPrefix(), patience_s=WAIT_S)
        self.replicas: dict[str, Replica] = {}
        self.seats = AsyncExitStack()

    async def add(self, name: str, version: str = "1", slots: int = 4, **more: Any) -> Replica:
        replica = self.replicas[name] = Replica(name, version, slots, **more)
        await replica.server.start("127.0.0.1")
        self.hear()
        await until(lambda: name in self.pool._members)
        return replica

    def hear(self) -> None:
        self.pool.heard(replica.state() for replica in self.replicas.values())

    async def take(self, **wanted: Any) -> str:
        seat = await self.seats.enter_async_context(self.pool.seat(CALL, **wanted))
        return seat.member.link.replica_id


def run(scenario: Callable[[Stage], Awaitable[None]]) -> None:
    async def inside() -> None:
        stage = Stage()
        try:
            await scenario(stage)
        finally:
            await stage.seats.aclose()
            await stage.pool.close()
            for replica in stage.replicas.values():
                await replica.server.close()

    uvloop.run(inside())


def test_calls_go_where_there_is_least_to_do_up_to_a_little_more_than_the_slots() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.add("a")
        await stage.add("b", slots=8)
        taken = [await stage.take() for _ in range(24)]
        assert (taken.count("a"), taken.count("b")) == (8, 16)  # 2 for each slot
        with pytest.raises(Full, match="room"):
            await stage.take(patience_s=0.01)

    run(scenario)


def test_those_that_wait_go_in_turn_when_room_comes() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.add("a", slots=1)
        held = [stage.pool.seat(CALL) for _ in range(2)]
        for seat in held:
            await seat.__aenter__()
        order: list[int] = []

        async def wait(number: int) -> None:
            async with stage.pool.seat(CALL):
                order.append(number)

        waiting = [asyncio.create_task(wait(number)) for number in range(5)]
        await until(lambda: stage.pool.waiting == 5)
        waiting[1].cancel()
        await held[0].__aexit__(None, None, None)
        await asyncio.gather(*waiting, return_exceptions=True)
        assert order == [0, 2, 3, 4]
        await held[1].__aexit__(None, None, None)
        assert [member.own for member in stage.pool._members.values()] == [0]

    run(scenario)


def test_a_client_that_leaves_as_its_call_is_refused_has_left() -> None:
    async def scenario(stage: Stage) -> None:
        waiting = asyncio.create_task(stage.take())
        await until(lambda: stage.pool.waiting == 1)
        stage.pool.give_up(0.0, "no replica comes")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert stage.pool.waiting == 0

    run(scenario)


def test_one_let_through_as_its_client_leaves_gives_its_room_back() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.add("a", slots=1)
        held = [stage.pool.seat(CALL) for _ in range(2)]
        for seat in held:
            await seat.__aenter__()
        waiting = asyncio.create_task(stage.take())
        await until(lambda: stage.pool.waiting == 1)
        await held[0].__aexit__(None, None, None)
        assert stage.pool.waiting == 0, "it was let through"
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await held[1].__aexit__(None, None, None)
        assert [member.own for member in stage.pool._members.values()] == [0]

    run(scenario)


def test_a_call_waits_for_a_replica_to_appear() -> None:
    async def scenario(stage: Stage) -> None:
        waiting = [asyncio.create_task(stage.take()) for _ in range(3)]
        await until(lambda: stage.pool.waiting == 3)
        await stage.add("a")
        assert await asyncio.gather(*waiting) == ["a"] * 3

    run(scenario)


def test_excluded_replicas_and_other_versions_are_never_chosen() -> None:
    async def scenario(stage: Stage) -> None:
        for name, version in (("a", "1"), ("b", "2"), ("c", "2")):
            await stage.add(name, version)
        assert [await stage.take(build="build 2", excluded=frozenset("b")) for _ in range(8)] == ["c"] * 8
        assert {await stage.take(excluded=frozenset("c")) for _ in range(4)} == {"a", "b"}
        with pytest.raises(VersionGone, match="no replica of its version and settings"):
            await stage.take(build="build 3")
        with pytest.raises(Full):
            await stage.take(build="build 2", excluded=frozenset("b"), patience_s=0.01)

    run(scenario)


def test_one_of_the_same_version_with_other_settings_is_another_one() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.add("fp32", "1", build="x")
        await stage.add("int8", "1", build="y")
        assert {await stage.take() for _ in range(2)} == {"fp32", "int8"}
        assert [await stage.take(build="x") for _ in range(4)] == ["fp32"] * 4

    run(scenario)


def test_a_call_goes_back_to_the_replica_it_was_lost_with_where_there_is_no_other() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.add("a")
        assert await stage.take(build="build 1", excluded=frozenset("a")) == "a"
        await stage.add("b")
        assert await stage.take(build="build 1", excluded=frozenset("a")) == "b"

    run(scenario)


def test_answers_that_have_begun_go_first() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.add("a", slots=1)
        held = [stage.pool.seat(CALL) for _ in range(2)]
        for seat in held:
            await seat.__aenter__()
        order: list[str] = []

        async def wait(name: str, build: str | None) -> None:
            async with stage.pool.seat(CALL, build=build):
                order.append(name)

        waiting = [asyncio.create_task(wait("new", None))]
        await until(lambda: stage.pool.waiting == 1)
        waiting.append(asyncio.create_task(wait("begun", "build 1")))
        await until(lambda: stage.pool.waiting == 2)
        await held[0].__aexit__(None, None, None)
        await asyncio.gather(*waiting)
        assert order == ["begun", "new"]
        await held[1].__aexit__(None, None, None)

    run(scenario)


def test_a_version_that_is_started_again_is_waited_for() -> None:
    async def scenario(stage: Stage) -> None:
        first = await stage.add("a", "1")
        await first.server.close()
        del stage.replicas["a"]
        await until(lambda: not stage.pool.usable)
        waiting = asyncio.create_task(stage.take(build="build 1"))
        await until(lambda: stage.pool.waiting == 1)
        await stage.add("b", "1")
        assert await waiting == "b"

    run(scenario)


def test_one_that_leaves_or_is_lost_is_out_at_once_whatever_was_told() -> None:
    async def scenario(stage: Stage) -> None:
        leaving, lost = await stage.add("a"), await stage.add("b")
        await stage.add("c")
        told = [replica.state() for replica in stage.replicas.values()]
        leaving.server.refuse_more()
        await lost.server.close()
        await until(lambda: "b" not in stage.pool._members and stage.pool._members["a"].link.leaving)
        stage.pool.heard(told)
        assert {await stage.take() for _ in range(5)} == {"c"}

    run(scenario)


def test_one_whose_connection_broke_is_connected_to_again() -> None:
    async def scenario(stage: Stage) -> None:
        replica = await stage.add("a")
        (peer,) = replica.server.peers
        peer._transport.abort()
        await until(lambda: not stage.pool._members)
        stage.hear()
        assert await stage.take() == "a"

    run(scenario)


def test_another_replica_at_the_address_is_not_taken_for_the_one_that_was_told_of() -> None:
    async def scenario(stage: Stage) -> None:
        replica = Replica("new")
        await replica.server.start("127.0.0.1")
        state = replica.state()
        stage.pool.heard([ReplicaState("m", "old", "1", state.load, {}, state.address, 4)])
        await until(lambda: not stage.pool._connecting)
        assert not stage.pool._members
        await replica.server.close()

    run(scenario)


def test_a_silent_replica_gets_no_new_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.channel.client.PING_S", 0.02)
    monkeypatch.setattr("serve.channel.client.SILENT_S", 0.1)

    async def scenario(stage: Stage) -> None:
        silent = await stage.add("a")
        await stage.add("b", slots=8)
        (peer,) = silent.server.peers
        peer._transport.pause_reading()
        await until(lambda: not stage.pool._members["a"].usable)
        assert {await stage.take() for _ in range(8)} == {"b"}
        peer._transport.resume_reading()
        await until(lambda: stage.pool._members["a"].usable)
        assert await stage.take() == "a"

    run(scenario)


def test_a_request_for_many_texts_is_answered_by_and_by() -> None:
    """However many: while some of them get room, the others wait on, beyond what a call waits where nothing moves."""

    async def scenario(stage: Stage) -> None:
        await stage.add("a", slots=1)
        done = 0

        async def text() -> None:
            nonlocal done
            async with stage.pool.seat(CALL, patience_s=0.1):
                await asyncio.sleep(0.04)
                done += 1

        await asyncio.gather(*(text() for _ in range(12)))  # two at a time: 0.24 s
        assert done == 12
        held = [await stage.take() for _ in range(2)]
        assert held == ["a", "a"]
        waiting = [asyncio.create_task(stage.take(patience_s=0.1)) for _ in range(3)]
        refused = await asyncio.gather(*waiting, return_exceptions=True)
        assert [str(each) for each in refused] == ["none had room within 0.1 s"] * 3

    run(scenario)


def test_a_version_whose_last_replica_leaves_is_gone() -> None:
    async def scenario(stage: Stage) -> None:
        old = await stage.add("a", "1")
        await stage.add("b", "2")
        old.server.refuse_more()
        stage.hear()
        await until(lambda: stage.pool._members["a"].link.leaving)
        with pytest.raises(VersionGone):
            await stage.take(build="build 1")

    run(scenario)


def test_those_that_have_waited_long_without_a_replica_are_told_why() -> None:
    async def scenario(stage: Stage) -> None:
        long = asyncio.create_task(stage.take())
        await asyncio.sleep(0.5)
        short = asyncio.create_task(stage.take())
        await until(lambda: stage.pool.waiting == 2)
        stage.pool.give_up(0.4, "it is not deployed")
        with pytest.raises(NoReplica, match="not deployed"):
            await long
        assert not short.done()
        short.cancel()

    run(scenario)


# -- the backend -----------------------------------------------------------------------------------------------------


def backend_of(stage: Stage) -> RayBackend:
    """Return a backend over the stage's pool, which hears of replicas by the stage alone."""
    backend = RayBackend("x", SECRET, patience_s=WAIT_S)
    backend._pools["m"] = stage.pool
    return backend


def test_a_call_that_was_lost_before_its_answer_goes_to_another_replica_once() -> None:
    async def scenario(stage: Stage) -> None:
        backend = backend_of(stage)
        first, second = await stage.add("a"), await stage.add("b")
        first.dies = True
        answer = await backend.infer("m", InferCall("r", {}))
        assert isinstance(answer, Inferred)
        assert answer.predictions == [{"by": "b"}]
        await stage.add("c")
        second.dies = stage.replicas["c"].dies = True  # the first one does anyway
        with pytest.raises(ApiError) as lost:
            await backend.infer("m", InferCall("poison", {}))
        assert (lost.value.status, lost.value.code) == (503, "replica_lost")
        assert sum(replica.calls for replica in stage.replicas.values()) == 2 + 2, "no more than two were ended"
        assert backend.pending["m"] == 0

    run(scenario)


def test_a_call_that_was_given_back_is_none_that_ends_replicas() -> None:
    async def scenario(stage: Stage) -> None:
        backend = backend_of(stage)
        leaving = [await stage.add(name) for name in "abc"]
        for replica in leaving:
            replica.server.leaving = True  # gateways have not heard of it
        waiting = asyncio.create_task(backend.infer("m", InferCall("r", {})))
        await until(lambda: not stage.pool.usable)
        await stage.add("d")
        answer = await waiting
        assert isinstance(answer, Inferred)
        assert answer.predictions == [{"by": "d"}]

    run(scenario)


def test_an_attempt_tells_that_its_replica_was_lost_and_pending_ends_with_the_first_message() -> None:
    async def scenario(stage: Stage) -> None:
        backend = backend_of(stage)
        replica = await stage.add("a")
        async with aclosing(backend.attempt("m", CALL)) as messages:
            asking = asyncio.create_task(anext(messages))
            await asyncio.sleep(0)
            assert backend.pending["m"] == 1
            await asking
            assert backend.pending["m"] == 0
            (peer,) = replica.server.peers
            peer._transport.abort()
            with pytest.raises(ReplicaLost):
                await anext(messages)

    run(scenario)


def test_a_text_whose_engine_fails_goes_on_at_another_replica() -> None:
    async def scenario(stage: Stage) -> None:
        backend = backend_of(stage)
        went_on: list[str] = []
        backend.went_on = went_on.append
        text = GenerateCall("r", "two tokens")

        async def told() -> list[Any]:
            return [each async for each in backend.generate("m", text)][1:]

        first = await stage.add("a")
        first.breaks = True
        assert (await told())[-1] == Refused(500, "the engine of a failed", "engine_failed", lost=True)
        other = stage.replicas["b"] = Replica("b")
        await other.server.start("127.0.0.1")
        stage.pool._members["a"].own += 1  # so that the next text begins at the other one
        other.breaks, first.breaks = True, False
        stage.hear()
        await until(lambda: "b" in stage.pool._members)
        assert await told() == [Chunk("b", 1, ids=(0,)), Chunk("a", 2, "stop", ids=(1,))]
        assert went_on == ["m", "m"]
        stage.pool._members["a"].own -= 1

    run(scenario)


def test_what_one_replica_sends_back_as_too_much_another_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "REFUSED_S", 0.05)

    async def scenario(stage: Stage) -> None:
        backend = backend_of(stage)
        busy = await stage.add("a")
        busy.server.most = 0  # other gateways were faster
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(backend.infer("m", InferCall("r", {})), 0.1)
        await stage.add("b")
        answer = await backend.infer("m", InferCall("r", {}))
        assert isinstance(answer, Inferred)
        assert answer.predictions == [{"by": "b"}]
        busy.server.most = 8
        await until(stage.pool._members["a"].candidate)
        assert busy.calls == 0

    run(scenario)


def test_a_stream_that_nobody_reads_holds_no_room_when_its_replica_is_done() -> None:
    """One request may ask for more texts than there is room for, and reads none before all have begun."""

    async def scenario(stage: Stage) -> None:
        backend = backend_of(stage)
        await stage.add("a", slots=1)
        streams = [backend.attempt("m", GenerateCall("r", "short")) for _ in range(8)]
        await asyncio.wait_for(asyncio.gather(*(anext(stream) for stream in streams)), WAIT_S)
        assert [member.own for member in stage.pool._members.values()] == [0]
        for stream in streams:
            await stream.aclose()
        assert [member.own for member in stage.pool._members.values()] == [0]

    run(scenario)


def test_what_clients_are_told() -> None:
    async def scenario(stage: Stage) -> None:
        backend = backend_of(stage)
        stage.pool._patience_s = backend._patience_s = 0.01
        with pytest.raises(ApiError) as none:
            await backend.infer("m", InferCall("r", {}))
        assert (none.value.status, none.value.code, none.value.headers) == (503, "not_ready", {"retry-after": "10"})
        await stage.add("a", slots=1)
        await stage.take()
        await stage.take()
        with pytest.raises(ApiError) as full:
            await backend.infer("m", InferCall("r", {}))
        assert (full.value.status, full.value.code, full.value.headers) == (429, "overloaded", {"retry-after": "1"})
        with pytest.raises(ApiError) as gone:
            await anext(backend.attempt("m", CALL, build="build 9"))
        assert (gone.value.status, gone.value.code) == (503, "replica_lost")

    run(scenario)


def test_what_comes_while_the_old_replica_leaves_and_the_new_one_is_not_there_yet() -> None:
    """It waits, and is answered, or told to come again when a replica could be there, as the last one has shown."""

    async def scenario(stage: Stage) -> None:
        backend = backend_of(stage)
        gateway = Gateway(backend, max_body_bytes=10_000, max_prompts=3)
        gateway.catalog = {"m": ModelCard("m", "causal-lm", "1", True, 0, {})}
        transport = httpx.ASGITransport(routes.build(lambda: gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            def ask() -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(
                    client.post("/v1/completions", json={"model": "m", "prompt": "two tokens", "max_tokens": 2})
                )

            old = await stage.add("a", "1", start_s=6.2)
            assert (await ask()).status_code == 200
            old.server.refuse_more()
            await until(lambda: not stage.pool.usable)
            backend._patience_s = 0.05
            refused = await ask()
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "9")
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("server_error", "not_ready")
            assert error["message"] == "'m' has no replica that is ready: none was there within 0.05 s"
            backend._patience_s = WAIT_S
            waits = ask()
            await until(lambda: stage.pool.waiting == 1)
            del stage.replicas["a"]
            await old.server.close()
            await stage.add("b", "2")
            answered = await waits
            assert (answered.status_code, answered.headers["x-tandem-model-version"]) == (200, "2")
            counted = gateway.metrics.record.snapshot(["m"])["counters"]
            assert counted["tandem_errors_total"] == [[["m", "not_ready"], 1]]

    run(scenario)


def test_an_answer_of_which_nothing_was_sent_is_given_anew_where_only_another_version_is_left() -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(backend_of(stage), max_body_bytes=10_000, max_prompts=3)
        gateway.catalog = {"m": ModelCard("m", "causal-lm", "1", True, 0, {})}
        transport = httpx.ASGITransport(routes.build(lambda: gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            def ask(stream: bool) -> asyncio.Task[httpx.Response]:
                body = {"model": "m", "prompt": "two tokens", "n": 2, "max_tokens": 2, "stream": stream}
                return asyncio.create_task(client.post("/v1/completions", json=body))

            old = await stage.add("a", "1", slots=8)
            old.stalls = True
            asked = [ask(stream=False), ask(stream=True)]
            await until(lambda: gateway.metrics.record.model("m").generated == 4)  # each text has its first token
            await stage.add("b", "2", slots=8)
            del stage.replicas["a"]
            stage.hear()
            await old.server.close()
            whole, streamed = await asyncio.gather(*asked)
            assert (whole.status_code, whole.headers["x-tandem-model-version"]) == (200, "2")
            assert [choice["text"] for choice in whole.json()["choices"]] == ["bb", "bb"], "nothing of the other one"
            assert whole.json()["usage"] == {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}
            assert (streamed.status_code, streamed.headers["x-tandem-model-version"]) == (200, "1")
            assert '"code":"replica_lost"' in streamed.text
            counters = gateway.metrics.record.snapshot(["m"])["counters"]
            assert counters["tandem_prompt_tokens_total"] == [[["m"], 2]], "once for each request"
            assert counters["tandem_generated_tokens_total"] == [[["m"], 4 + 2]]

    run(scenario)


def test_the_texts_of_an_answer_are_of_one_version_while_two_are_served() -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(backend_of(stage), max_body_bytes=10_000, max_prompts=3)
        gateway.catalog = {"m": ModelCard("m", "causal-lm", "1", True, 0, {})}
        transport = httpx.ASGITransport(routes.build(lambda: gateway))
        await stage.add("a", "1", slots=8)
        await stage.add("b", "2", slots=8)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"model": "m", "prompt": "two tokens", "n": 3, "max_tokens": 2}
            for _ in range(4):
                answer = await client.post("/v1/completions", json=body)
                replica = {"1": "a", "2": "b"}[answer.headers["x-tandem-model-version"]]
                assert [choice["text"] for choice in answer.json()["choices"]] == [2 * replica] * 3

    run(scenario)
