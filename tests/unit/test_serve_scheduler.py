"""Who runs in which step and holds which blocks, checked against a cache that remembers who wrote what."""

import random
import time
from collections.abc import Sequence as Items

import pytest

from serve.engines.protocol import GenerationRequest, SamplingParams
from serve.engines.torch.blocks import BLOCK, BlockPool, content_name
from serve.engines.torch.scheduler import Chunk, Scheduler, Sequence, Step


def sequence(prompt: int | Items[int], name: str = "s", max_tokens: int = 8, scored: bool = False) -> Sequence:
    tokens = tuple(range(prompt)) if isinstance(prompt, int) else tuple(prompt)
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=scored)
    return Sequence(GenerationRequest(name, tokens, params), max_tokens)


def scheduler_of(blocks: int, max_running: int = 8, prefill_tokens: int = 64) -> Scheduler:
    return Scheduler(BlockPool(blocks), max_running, prefill_tokens)


class Ledger:
    """What a cache would hold: for each slot, the whole text up to the token whose key and value lie there."""

    def __init__(self) -> None:
        self.slots: dict[int, tuple[int, ...]] = {}

    def run(self, scheduler: Scheduler, step: Step) -> None:
        """Write every token of a step, then check that each sequence finds all of its own text."""
        for chunk in step.chunks:
            for at in range(chunk.start, chunk.end):
                self.slots[_slot(chunk, at)] = tuple(chunk.sequence.tokens[: at + 1])
        for chunk in step.chunks:
            for at in range(chunk.end):
                assert self.slots[_slot(chunk, at)] == tuple(chunk.sequence.tokens[: at + 1])
        scheduler.ran(step)
        for chunk in step.chunks:
            if chunk.completes:
                chunk.sequence.tokens.append(1000 + chunk.sequence.completion_tokens)


def _slot(chunk: Chunk, at: int) -> int:
    return chunk.sequence.blocks[at // BLOCK] * BLOCK + at % BLOCK


def run_to_the_end(scheduler: Scheduler, ledger: Ledger) -> None:
    while step := scheduler.next_step():
        ledger.run(scheduler, step)
        for done in [s for s in scheduler.running if s.completion_tokens >= s.max_tokens]:
            scheduler.remove(done)


@pytest.mark.parametrize("seed", range(12))
def test_every_sequence_finds_its_own_text_through_any_order_of_events(seed: int) -> None:
    """Few blocks, shared beginnings, cancellations: prefixes are reused, texts give way and come back."""
    rng = random.Random(seed)
    scheduler = scheduler_of(blocks=rng.randint(10, 14), max_running=4, prefill_tokens=rng.choice([7, 64]))
    ledger = Ledger()
    beginnings = [tuple(rng.randrange(3) for _ in range(100)) for _ in range(2)]
    alive: list[Sequence] = []
    for at in range(300):
        if rng.random() < 0.3:
            prompt = rng.choice(beginnings)[: rng.randint(1, 100)] + tuple(rng.randrange(3) for _ in range(20))
            alive.append(sequence(prompt, str(at), max_tokens=rng.randint(1, 150), scored=rng.random() < 0.1))
            scheduler.add(alive[-1])
        if step := scheduler.next_step():
            budget = scheduler.prefill_tokens * (1 if step.decode else 4)
            assert sum(chunk.end - chunk.start for chunk in step.prefill) <= budget
            assert all(chunk.end - chunk.start == 1 for chunk in step.decode)
            ledger.run(scheduler, step)
        for gone in [s for s in alive if s.completion_tokens >= s.max_tokens or rng.random() < 0.005]:
            alive.remove(gone)
            scheduler.remove(gone)
        assert len(scheduler.running) + len(scheduler.waiting) == len(alive)
        assert scheduler.pool.held == len({block for s in scheduler.running for block in s.blocks})
        assert scheduler.pool.held + scheduler.pool.available == scheduler.pool.total
    for left in alive:
        scheduler.remove(left)
    assert scheduler.pool.held == 0


def test_prompts_are_admitted_in_order_within_the_budget() -> None:
    scheduler = scheduler_of(20, prefill_tokens=10)
    for prompt in (16, 16, 28, 3):
        scheduler.add(sequence(prompt))
    step = scheduler.next_step()
    assert step is not None
    assert [(chunk.start, chunk.end, chunk.completes) for chunk in step.prefill] == [
        (0, 16, True),
        (0, 16, True),
        (0, 8, False),
    ]
    assert len(scheduler.waiting) == 1


def test_a_running_stream_gets_its_token_in_each_step_of_a_long_prompt() -> None:
    scheduler = scheduler_of(40, prefill_tokens=16)
    scheduler.add(sequence(60, "first", max_tokens=50))
    step = scheduler.next_step()
    assert step is not None
    assert step.prefill[0].end == 60  # nobody waits for a token: the budget is larger
    Ledger().run(scheduler, step)
    scheduler.add(sequence([7] * 160, "long"))
    for expected in range(16, 161, 16):
        step = scheduler.next_step()
        assert step is not None
        assert [chunk.sequence.request.request_id for chunk in step.decode] == ["first"]
        assert step.prefill[0].end == expected
        scheduler.ran(step)
        step.decode[0].sequence.tokens.append(1)


def test_few_rows_of_logits_are_wanted_at_once() -> None:
    scheduler = scheduler_of(60, prefill_tokens=1000)
    for prompt in (200, 200, 20):
        scheduler.add(sequence([prompt] * prompt, scored=prompt == 200))
    ledger = Ledger()
    steps = []
    while any(s.completion_tokens == 0 for s in (*scheduler.running, *scheduler.waiting)):
        step = scheduler.next_step()
        assert step is not None
        steps.append([(chunk.start, chunk.end) for chunk in step.prefill])
        ledger.run(scheduler, step)
    assert steps == [[(0, 200), (0, 56), (0, 20)], [(56, 200)]]


def test_slow_steps_get_fewer_prompt_tokens() -> None:
    scheduler = Scheduler(BlockPool(40), 8, prefill_tokens=256, longest_stall_s=0.1)
    step = Step([], [Chunk(sequence(300), 0, 256, False)])
    for _ in range(10):
        scheduler.observe_step_time(step, seconds=0.2)
    assert 128 <= scheduler.prefill_tokens < 132
    for _ in range(20):
        scheduler.observe_step_time(step, seconds=60.0)
    assert scheduler.prefill_tokens == BLOCK
    for _ in range(20):
        scheduler.observe_step_time(step, seconds=0.01)
    assert scheduler.prefill_tokens == 256


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    scheduler = scheduler_of(20, prefill_tokens=200)
    scheduler.add(sequence(100))
    run_to_the_end(scheduler, Ledger())
    scheduler.add(sequence(100))
    step = scheduler.next_step()
    assert step is not None
    assert step.prefill[0].start == 96  # three whole blocks
    # a text of whole blocks only: the last is run again, because somebody wants its logits
    scheduler.add(sequence(96))
    step = scheduler.next_step()
    assert step is not None
    assert step.prefill[-1].start == 64
    scheduler.add(sequence(96, scored=True))
    step = scheduler.next_step()
    assert step is not None
    assert step.prefill[-1].start == 0


def test_the_same_prompt_many_times_at_once_is_computed_once() -> None:
    scheduler = scheduler_of(40, max_running=8, prefill_tokens=200)
    for _ in range(5):
        scheduler.add(sequence(100, max_tokens=2))
    step = scheduler.next_step()
    assert step is not None
    assert [chunk.start for chunk in step.prefill] == [0, 96, 96, 96, 96]
    Ledger().run(scheduler, step)
    assert scheduler.pool.held == 3 + 5


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    scheduler = scheduler_of(1 + 6, prefill_tokens=200)
    old, young, third = (sequence([t] * 64, str(t), max_tokens=60) for t in range(3))
    for waiting in (old, young, third):
        scheduler.add(waiting)
    ledger = Ledger()
    while not scheduler.preemptions:
        step = scheduler.next_step()
        assert step is not None
        ledger.run(scheduler, step)
    # two blocks each and one for each that runs: the third was not admitted, the second had to leave
    assert scheduler.running == [old]
    assert list(scheduler.waiting) == [young, third]
    run_to_the_end(scheduler, ledger)
    assert [s.completion_tokens for s in (old, young, third)] == [60, 60, 60]
    assert scheduler.pool.held == 0


def test_blocks_idle_longest_are_overwritten_first_and_a_text_from_its_end() -> None:
    pool = BlockPool(5)
    names = [content_name(b"", [i]) for i in range(4)]
    first, second = [pool.take(), pool.take()], [pool.take(), pool.take()]
    for block, name in zip(first + second, names, strict=True):
        pool.publish(block, name)
    pool.release(first)
    pool.release(second)
    assert (pool.held, pool.available) == (0, 4)
    assert [pool.take() for _ in range(3)] == [first[1], first[0], second[1]]
    assert [pool.find(name) for name in names] == [None, None, second[0], None]
    pool.forget()
    assert pool.find(names[2]) is None
    assert pool.available == 1


def test_ten_thousand_requests_leave_no_block_behind() -> None:
    rng = random.Random(1)
    scheduler = scheduler_of(30, max_running=16, prefill_tokens=256)
    alive: list[Sequence] = []
    added = 0
    began = time.monotonic()
    while added < 10_000 or alive:
        for _ in range(4):
            if added < 10_000 and len(alive) < 40:
                prompt = [rng.randrange(2)] * rng.randint(1, 60)
                alive.append(sequence(prompt, str(added), max_tokens=rng.randint(1, 90)))
                scheduler.add(alive[-1])
                added += 1
        if step := scheduler.next_step():
            scheduler.ran(step)
            for chunk in step.chunks:
                if chunk.completes:
                    chunk.sequence.tokens.append(rng.randrange(2))
        gone = [s for s in alive if s.completion_tokens >= s.max_tokens or rng.random() < 0.002]
        for done in gone:
            scheduler.remove(done)
        alive = [s for s in alive if s not in gone]
    assert scheduler.pool.held == 0
    assert sorted(scheduler.pool.take() for _ in range(29)) == list(range(1, 30))
    assert scheduler.preemptions > 0
    assert time.monotonic() - began < 60
