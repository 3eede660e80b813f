"""Who runs in which slot and step."""

import random

import pytest

from serve.engine import GenerationRequest
from serve.torch_engine.scheduler import Scheduler, Sequence


def sequence(prompt: int, name: str = "s") -> Sequence:
    return Sequence(GenerationRequest(name, tuple(range(prompt))), max_tokens=8)


@pytest.mark.parametrize("seed", range(20))
def test_slots_hold_their_own_sequence_through_any_order_of_events(seed: int) -> None:
    """Replay the scheduler's steps and moves on a model cache that remembers which sequence wrote each token."""
    rng = random.Random(seed)
    scheduler = Scheduler(slots=4, prefill_tokens=5)
    cache: list[list[tuple[str, int]]] = [[] for _ in range(4)]
    alive: list[Sequence] = []
    for at in range(200):
        if rng.random() < 0.3:
            alive.append(sequence(rng.randint(1, 12), str(at)))
            scheduler.add(alive[-1])
        step = scheduler.next_step()
        if step is not None:
            assert sum(chunk.end - chunk.start for chunk in step.prefill) <= 5
            assert [chunk.slot for chunk in step.decode] == list(range(len(step.decode)))
            for chunk in step.chunks:
                row = cache[chunk.slot][: chunk.start]
                assert row == [(chunk.sequence.request.request_id, i) for i in range(chunk.start)]
                cache[chunk.slot] = row + [
                    (chunk.sequence.request.request_id, i) for i in range(chunk.start, chunk.end)
                ]
            completing = step.completing
            scheduler.ran(step)
            for chunk in completing:
                chunk.sequence.tokens.append(0)
        leaving = [s for s in alive if s.completion_tokens >= s.max_tokens or rng.random() < 0.05]
        for gone in leaving:
            alive.remove(gone)
            for move in scheduler.remove(gone):
                cache[move.target] = cache[move.source][: move.length]
    assert len(scheduler.running) + len(scheduler.waiting) == len(alive)
    assert scheduler.cached_tokens == sum(s.cached for s in alive)


def test_prompts_are_admitted_in_order_within_the_budget() -> None:
    scheduler = Scheduler(slots=8, prefill_tokens=10)
    for prompt in (4, 4, 7, 3):
        scheduler.add(sequence(prompt))
    step = scheduler.next_step()
    assert step is not None
    assert [(chunk.slot, chunk.start, chunk.end) for chunk in step.prefill] == [(0, 0, 4), (1, 0, 4), (2, 0, 2)]
    assert len(scheduler.waiting) == 1
