"""Every sampling field against transformers' logits processors, and rows that do not see each other."""

import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serve.engines.protocol import SamplingParams
from serve.engines.torch.sampler import RUN, RUNS, RequestSampler, choose, kept_tokens, weights_of

VOCAB = 1000


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits_of(seed: int, rows: int = 1, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def expected_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution that transformers' processors leave, [1, vocab]."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k > 0:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors(torch.zeros(1, 1, dtype=torch.long), logits.clone()).softmax(-1)


TRUNCATIONS = [
    SamplingParams(top_k=5),
    SamplingParams(top_k=1, temperature=0.7),
    SamplingParams(top_p=0.3),
    SamplingParams(top_p=0.95, temperature=1.5),
    SamplingParams(top_p=0.999, temperature=5.0),
    SamplingParams(min_p=0.1),
    SamplingParams(min_p=0.0001, temperature=2.0),
    SamplingParams(top_k=700, temperature=4.0),
    SamplingParams(top_k=40, top_p=0.8, min_p=0.02, temperature=0.8),
]


@pytest.mark.parametrize("params", TRUNCATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_truncation_equals_transformers(params: SamplingParams, seed: int) -> None:
    logits = logits_of(seed)
    weights = weights_of(logits.numpy()[0], params.temperature)
    kept = kept_tokens(weights, params)
    actual = torch.zeros(1, VOCAB)
    actual[0, kept.copy()] = torch.from_numpy(weights[kept])
    torch.testing.assert_close(actual / actual.sum(), expected_probabilities(logits, params), atol=1e-6, rtol=1e-4)
    assert (np.diff(weights[kept]) <= 0).all()


@pytest.mark.parametrize("params", [SamplingParams(), *TRUNCATIONS])
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits = logits_of(7)
    sampler = sampler_of(SamplingParams(**{**vars(params), "seed": 1}))
    draws = torch.tensor([choose(logits, [sampler])[0] for _ in range(800)])
    share = torch.bincount(draws, minlength=VOCAB) / len(draws)
    expected = expected_probabilities(logits, params)[0]
    # four standard deviations of a share over 800 draws
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / len(draws)).sqrt() + 2e-3).all()
    assert (share[expected == 0] == 0).all()


def sampler_of(params: SamplingParams, prompt: tuple[int, ...] = (1,)) -> RequestSampler:
    return RequestSampler(params, prompt)


def changed(sampler: RequestSampler, logits: torch.Tensor) -> torch.Tensor:
    row = logits.numpy().copy()
    sampler.change(row)
    return torch.from_numpy(row)


def plain_choice(logits: list[float], params: SamplingParams, prompt: list[int], output: list[int], number: int) -> int:
    """The whole of a choice, spelled out over Python floats."""
    scores = dict(enumerate(logits))
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    for token in {*prompt, *output}:
        positive = scores[token] > 0
        scores[token] *= 1 / params.repetition_penalty if positive else params.repetition_penalty
    for token in set(output):
        scores[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    ranked = sorted(scores, key=lambda token: -scores[token])
    if params.temperature == 0:
        return ranked[0]
    weights = {token: math.exp((scores[token] - scores[ranked[0]]) / params.temperature) for token in ranked}
    kept = ranked[: params.top_k] if params.top_k > 0 else ranked
    total = sum(weights[token] for token in kept)
    nucleus, reached = [], 0.0
    for token in kept:
        if reached >= params.top_p * total and params.top_p < 1:
            break
        nucleus.append(token)
        reached += weights[token]
    kept = [token for token in nucleus if weights[token] >= params.min_p]
    if not (params.top_k > 0 or params.top_p < 1 or params.min_p):  # nothing was ranked: first a run, then one of it
        runs = [range(start, min(start + RUN, len(logits))) for start in range(0, len(logits), RUN)]
        sums = {RUNS + at: sum(weights[token] for token in run) for at, run in enumerate(runs)}
        kept = list(runs[plain_first(sums, number) - RUNS])
    return plain_first({token: weights[token] for token in kept}, number)


def plain_first(weights: dict[int, float], number: int) -> int:
    """Return the name whose exponential wait, by a hash of its own, is the shortest."""
    return min((-math.log(plain_uniform(number, name)) / weight, name) for name, weight in weights.items())[1]


def plain_uniform(number: int, name: int) -> float:
    """SplitMix64 as its authors wrote it, in whole numbers."""
    mixed = (number + (name + 1) * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return ((mixed ^ mixed >> 31) >> 12) * 2.0**-52 + 2.0**-53


@pytest.mark.parametrize("seed", range(60))
def test_any_mixture_of_fields_equals_a_plain_reference(seed: int) -> None:
    rng = random.Random(seed)
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.5, 1.0, 2.5]),
        top_p=rng.choice([1.0, 0.5, 0.9, 0.99]),
        top_k=rng.choice([0, -1, 5, 300]),
        min_p=rng.choice([0.0, 0.0, 0.02]),
        presence_penalty=rng.choice([0.0, 1.5, -1.0]),
        frequency_penalty=rng.choice([0.0, 0.7]),
        repetition_penalty=rng.choice([1.0, 1.3, 0.8]),
        logit_bias=rng.choice([{}, {3: 5.0, 999: -100.0}]),
        seed=rng.randrange(-(2**63), 2**63),
    )
    prompt = [rng.randrange(VOCAB) for _ in range(20)]
    sampler = sampler_of(params, tuple(prompt))
    numbers = random.Random(params.seed % 2**64 if params.seed is not None else None)
    output: list[int] = []
    for step in range(25):
        logits = logits_of(1000 * seed + step, spread=2.0)
        token = choose(logits, [sampler])[0]
        number = 0 if params.greedy else numbers.getrandbits(64)
        assert token == plain_choice(logits[0].tolist(), params, prompt, output, number)
        assert token is not None
        output.append(token)


def test_what_rounds_otherwise_is_drawn_alike() -> None:
    """Two batches, or two replicas, differ in the last bits of their logits: a draw must not hang on them."""
    logits = logits_of(5, rows=1, spread=0.3)
    noise = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(6)) * 1e-6
    for params in ({}, {"top_k": 300}, {"top_p": 0.9}):
        one, two = (sampler_of(SamplingParams(seed=7, **params)) for _ in range(2))
        drawn = [(choose(logits, [one])[0], choose(logits + noise, [two])[0]) for _ in range(2000)]
        assert sum(a != b for a, b in drawn) <= 1, params


def test_a_vocabulary_that_fills_no_whole_run_is_drawn_from_to_its_end() -> None:
    logits = torch.full((1, 131), float("-inf"))
    logits[0, [0, 64, 130]] = 0.0
    sampler = sampler_of(SamplingParams(seed=1))
    assert {choose(logits, [sampler])[0] for _ in range(60)} == {0, 64, 130}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-320, 5e-324])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_next_to_nothing_as_temperature_is_greedy(temperature: float, top_p: float) -> None:
    logits = logits_of(1, rows=2) * 10
    samplers = [sampler_of(SamplingParams(temperature=temperature, top_p=top_p)) for _ in range(2)]
    assert choose(logits, samplers) == logits.argmax(-1).tolist()


def test_greedy_is_the_best_whatever_the_other_fields_say() -> None:
    logits = logits_of(1, rows=2)
    samplers = [sampler_of(SamplingParams(temperature=0, top_k=3)), sampler_of(SamplingParams(temperature=0))]
    assert choose(logits, samplers) == logits.argmax(-1).tolist()


def test_repetition_penalty_equals_transformers() -> None:
    prompt, output = (3, 9, 9), [17, 4]
    sampler = sampler_of(SamplingParams(repetition_penalty=1.7), prompt)
    for token in output:
        sampler.observe(token)
    logits = logits_of(2)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[*prompt, *output]]), logits.clone())
    torch.testing.assert_close(changed(sampler, logits[0]), expected[0])


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    sampler = sampler_of(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), (8,))
    for token in (3, 3, 5):
        sampler.observe(token)
    logits = torch.zeros(VOCAB)
    expected = torch.zeros(VOCAB)
    expected[3], expected[5] = -0.5 - 2 * 0.25, -0.5 - 0.25
    torch.testing.assert_close(changed(sampler, logits), expected)


def test_penalties_change_what_a_batch_chooses_for_their_row_only() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 5], logits[:, 6] = 1.0, 0.9
    samplers = [
        sampler_of(SamplingParams(temperature=0, frequency_penalty=0.2)),
        sampler_of(SamplingParams(temperature=0)),
    ]
    assert [choose(logits, samplers) for _ in range(2)] == [[5, 5], [6, 5]]
    assert logits[0, 5] == 1.0


def test_a_seed_fixes_the_tokens_whatever_the_batch() -> None:
    logits = logits_of(5, rows=6)
    params = [SamplingParams(seed=1), SamplingParams(seed=2, top_p=0.9), SamplingParams(temperature=0)] * 2
    alone = [[choose(logits[i : i + 1], [s])[0] for s in [sampler_of(params[i])] for _ in range(20)] for i in range(6)]
    samplers = [sampler_of(p) for p in params]
    crowd = [choose(logits, samplers) for _ in range(20)]
    assert [list(row) for row in zip(*crowd, strict=True)] == alone
    assert alone[0] != [choose(logits[:1], [s])[0] for s in [sampler_of(SamplingParams(seed=3))] for _ in range(20)]


def test_without_a_seed_two_requests_differ() -> None:
    logits = torch.zeros(1, VOCAB)
    first, second = ([choose(logits, [s])[0] for _ in range(10)] for s in (sampler_of(SamplingParams()) for _ in "ab"))
    assert first != second


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_choose_nothing(bad: float, temperature: float) -> None:
    logits = logits_of(1, rows=2)
    logits[0, 17] = bad
    chosen = choose(logits, [sampler_of(SamplingParams(temperature=temperature, seed=1)) for _ in range(2)])
    assert chosen[0] is None
    assert chosen[1] is not None
