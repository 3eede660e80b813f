"""What the gateway does when the replica under a stream is lost: what it asks the next one, and when it gives up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from serve.routing.lost import ReplicaLost
from serve.routing.resuming import MOST_LOST, Message, Progress, resumed, seeded
from serve.wire import Chunk, GenerateCall, Identity, Opened, Refused

CALL = GenerateCall("r", "x", {"temperature": 0})
V1, V2 = Opened(Identity("1", "run", "b1"), 3), Opened(Identity("2", "run", "b2"), 3)
LOST, MOVED = ReplicaLost("a"), ReplicaLost("a", moved=True)


def piece(count: int, *ids: int, text: str = "t", reason: Any = None) -> Chunk:
    return Chunk(text, count, reason, ids=ids)


class Replicas:
    """Each attempt gives its messages, or raises what stands among them; and what each was asked."""

    def __init__(self, *attempts: Sequence[Message | Exception]) -> None:
        self._attempts = list(attempts)
        self.asked: list[tuple[tuple[int, ...], frozenset[str], str | None]] = []
        self.seeds: list[int | None] = []
        self.closed = 0

    async def __call__(
        self, call: GenerateCall, excluded: frozenset[str], build: str | None
    ) -> AsyncGenerator[Message, None]:
        self.asked.append((call.generated, excluded, build))
        self.seeds.append(call.sampling.get("seed"))
        try:
            for message in self._attempts.pop(0):
                if isinstance(message, Exception):
                    raise message
                yield message
        finally:
            self.closed += 1


def told(replicas: Replicas, call: GenerateCall = CALL) -> list[Message]:
    async def collected() -> list[Message]:
        return [message async for message in resumed(replicas, call)]

    return asyncio.run(collected())


def test_the_next_replica_goes_on_after_the_tokens_that_were_handed_on() -> None:
    replicas = Replicas(
        [V1, piece(2, 7, 8), piece(3, 9, text=""), ReplicaLost("a")],
        [V1, piece(4, 6), ReplicaLost("b")],
        [V1, piece(5, 5, reason="stop")],
    )
    assert told(replicas) == [V1, piece(2, 7, 8), piece(3, 9, text=""), piece(4, 6), piece(5, 5, reason="stop")]
    assert replicas.asked == [
        ((), frozenset(), None),
        ((7, 8, 9), frozenset({"a"}), "b1"),
        ((7, 8, 9, 6), frozenset({"a", "b"}), "b1"),
    ]
    assert replicas.closed == 3


def test_before_anything_was_handed_on_the_call_is_tried_again_at_any_version() -> None:
    replicas = Replicas([LOST], [V2, piece(1, 7, reason="length")])
    assert told(replicas) == [V2, piece(1, 7, reason="length")]
    assert replicas.asked == [((), frozenset(), None), ((), frozenset({"a"}), None)]


def test_an_accepted_call_without_a_token_begins_again_at_its_version() -> None:
    replicas = Replicas([V1, LOST], [V1, piece(1, 7, reason="length")])
    assert told(replicas) == [V1, piece(1, 7, reason="length")]
    assert replicas.asked[1] == ((), frozenset({"a"}), "b1")


@pytest.mark.parametrize(
    "attempts",
    [
        [[LOST], [ReplicaLost("b")]],
        [[V1, LOST], [V1, ReplicaLost("b")]],
        [[V1, piece(1, 7), LOST], [V1, ReplicaLost("b")]],  # it dies of the token that comes now
    ],
    ids=["before it is accepted", "accepted", "in the middle"],
)
def test_a_request_that_ends_replicas_ends_two_at_one_place(attempts: list[list[Message | Exception]]) -> None:
    replicas = Replicas(*attempts)
    last = told(replicas)[-1]
    lost = 2
    assert last == Refused(503, f"{lost} replicas were lost while they worked on this request", "replica_lost")
    assert len(replicas.asked) == len(attempts)


FAILED = Refused(500, "the engine failed", "engine_failed", lost=True)


def test_a_text_goes_on_where_another_engine_lives() -> None:
    replicas = Replicas([V1, piece(1, 7), ReplicaLost("a", refused=FAILED)], [V1, piece(2, 8, reason="stop")])
    assert told(replicas) == [V1, piece(1, 7), piece(2, 8, reason="stop")]
    assert replicas.asked[1] == ((7,), frozenset({"a"}), "b1")


@pytest.mark.parametrize("first", [[], [V1, piece(1, 7)], [V1, piece(2, 7)]], ids=["at once", "later", "not counted"])
def test_a_request_that_breaks_engines_breaks_two_and_is_told_of_it(first: list[Message | Exception]) -> None:
    broken = [ReplicaLost(name, refused=FAILED) for name in "ab"]
    replicas = Replicas([*first, broken[0]], [broken[1]])
    assert told(replicas) == [*first, FAILED]
    assert len(replicas.asked) <= 2


def test_losses_with_progress_between_them_are_bounded() -> None:
    attempts: list[list[Message | Exception]] = [[V1, piece(at, at), ReplicaLost(str(at))] for at in range(1, 9)]
    replicas = Replicas(*attempts)
    assert isinstance(told(replicas)[-1], Refused)
    assert len(replicas.asked) == MOST_LOST


def test_replicas_that_leave_do_not_count_and_are_not_asked_again() -> None:
    leaving: list[list[Message | Exception]] = [[ReplicaLost(str(at), moved=True)] for at in range(2 * MOST_LOST)]
    replicas = Replicas(*leaving, [V1, piece(1, 7, reason="stop")])
    assert told(replicas) == [V1, piece(1, 7, reason="stop")]
    assert replicas.asked[-1][1] == frozenset(map(str, range(2 * MOST_LOST)))


def test_an_answer_is_of_one_version() -> None:
    replicas = Replicas([V1, piece(1, 7), LOST], [V2, piece(2, 8, reason="stop")])
    said = "the replica of version 1 was lost, and there is only version 2 now"
    assert told(replicas) == [V1, piece(1, 7), Refused(503, said, "replica_lost")]
    assert replicas.closed == 2


def test_an_answer_is_of_one_build_of_its_version() -> None:
    other = Opened(Identity("1", "run", "of another precision"), 3)
    replicas = Replicas([V1, piece(1, 7), LOST], [other, piece(2, 8, reason="stop")])
    said = "the replica of version 1 was lost, and there is only that version with other settings now"
    assert told(replicas) == [V1, piece(1, 7), Refused(503, said, "replica_lost")]


def test_a_replica_that_begins_anew_is_not_listened_to() -> None:
    replicas = Replicas([V1, piece(2, 7, 8), LOST], [V1, piece(1, 7), piece(2, 8)])
    *before, last = told(replicas)
    assert before == [V1, piece(2, 7, 8)]
    assert isinstance(last, Refused)
    assert last.code == "replica_lost"


@pytest.mark.parametrize("chunk", [piece(2, 7), piece(2), piece(0)], ids=["too few", "none", "only text"])
def test_a_replica_that_does_not_tell_its_tokens_ends_its_streams(chunk: Chunk) -> None:
    replicas = Replicas([V1, chunk, LOST])
    *before, last = told(replicas)
    assert before == [V1, chunk]
    assert isinstance(last, Refused)
    assert (last.status, last.code) == (503, "replica_lost")
    assert len(replicas.asked) == 1


def test_what_a_replica_refuses_is_handed_on() -> None:
    refusal = Refused(503, "cannot go on", "replica_lost")
    assert told(Replicas([V1, piece(1, 7), LOST], [refusal])) == [V1, piece(1, 7), refusal]


def test_a_loss_after_the_end_changes_nothing() -> None:
    whole = [V1, piece(1, 7, reason="stop")]
    assert told(Replicas([*whole, LOST])) == whole


def test_closing_the_stream_closes_the_attempt() -> None:
    replicas = Replicas([V1, piece(1, 7), LOST], [V1, piece(2, 8), piece(3, 9)])

    async def scenario() -> None:
        async with aclosing(resumed(replicas, CALL)) as stream:
            for _ in range(3):
                await anext(stream)
        assert replicas.closed == 2

    asyncio.run(scenario())


def test_calls_without_a_seed_get_one_of_their_own_for_all_attempts() -> None:
    def seeds(sampling: dict[str, Any]) -> list[int | None]:
        replicas = Replicas([LOST], [V1, piece(1, 7, reason="stop")])
        told(replicas, GenerateCall("r", "x", sampling))
        return replicas.seeds

    first, second = seeds({}), seeds({"temperature": 0.5})
    assert first[0] == first[1] is not None
    assert first != second
    assert seeds({"seed": 0}) == [0, 0]
    assert seeds({"temperature": 0}) == [None, None]


def test_a_seed_is_added_and_nothing_else_changes() -> None:
    call = GenerateCall("r", "x", {"top_p": 0.5}, 7)
    assert seeded(call, 5) == GenerateCall("r", "x", {"top_p": 0.5, "seed": 5}, 7)
    assert call.sampling == {"top_p": 0.5}


def test_progress_goes_on_from_a_call_that_was_resumed_before() -> None:
    progress = Progress(GenerateCall("r", "x", generated=(1, 2)))
    progress.take(V1)
    progress.take(piece(3, 3))
    assert progress.lose(MOVED) is None
    assert progress.call.generated == (1, 2, 3)
