"""Logits → tokens, each request by its own rules.

Everything works row by row, and a request draws one number a token from a generator of its own, so the token chosen
depends on the request's own logits alone, whatever else is in the batch. The order of the rules is that of
transformers' logits processors: schema, bias, penalties, least length, temperature, top_k, top_p, min_p.

Drawing is numpy's, on the CPU: torch's topk took 1.3 ms for each row of 8,192.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from serve.engines.grammar import Constraint
from serve.engines.protocol import SamplingParams

CANDIDATES = 512
"""Most likely tokens ranked first for top_p and min_p; a row that needs more has its whole vocabulary ranked."""
RUN = 128
"""Weights summed together on the way to the one that is drawn."""
RUNS = 2**40
"""Runs are named from here on, beyond any token."""
ELEMENTS = 2**17
"""Weights that are worked on together, so that they stay in a core's cache: with 2**20, three times as slow."""
ONE, GOLDEN = np.uint64(1), np.uint64(0x9E3779B97F4A7C15)
MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(12))


class RequestSampler:
    """What one request's sampling remembers from token to token: its generator and the tokens it has seen."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        constraint: Constraint | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        """`ends` are the tokens that would end the text, and may not before `min_tokens`."""
        self.params = params
        self.constraint = constraint
        self._ends = list(ends)
        self._too_early = params.min_tokens
        """So many tokens are still to come before the text may end."""
        # random.seed takes the absolute value of an integer
        self._generator = random.Random(None if params.seed is None else params.seed % 2**64)
        self._counted = bool(params.presence_penalty or params.frequency_penalty)
        self._repeated = params.repetition_penalty != 1.0
        self._counts: Counter[int] = Counter()
        self._seen = set(prompt) if self._repeated else set()
        biased = bool(params.logit_bias) or params.min_tokens > 0
        self.changes_logits = self._counted or self._repeated or biased or constraint is not None

    def draw(self) -> int:
        """Return the request's next number of 64 bits, all that chance says about a token."""
        return self._generator.getrandbits(64)

    def resume(self, generated: Sequence[int]) -> None:
        """Come to where a sampler is that has chosen these tokens: as many numbers drawn, all of them remembered."""
        for token in generated:
            if not self.params.greedy:
                self.draw()
            if self.changes_logits:
                self.observe(token)

    def change(self, logits: np.ndarray) -> None:
        """Apply the schema's mask, bias and penalties to a row [vocab], in place."""
        if self.constraint is not None:
            logits[self.constraint.forbidden()] = -np.inf
        if self.params.logit_bias:
            logits[list(self.params.logit_bias)] += np.fromiter(self.params.logit_bias.values(), np.float32)
        if self._repeated:
            seen, penalty = list(self._seen), np.float32(self.params.repetition_penalty)
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        if self._counts:
            counts = np.fromiter(self._counts.values(), np.float32)
            logits[list(self._counts)] -= self.params.frequency_penalty * counts + self.params.presence_penalty
        if self._too_early > 0:
            logits[self._ends] = -np.inf

    def observe(self, token: int) -> None:
        """Remember a chosen token for the penalties, the schema and the least length."""
        self._too_early -= 1
        if self.constraint is not None:
            self.constraint.observe(token)
        if self._counted:
            self._counts[token] += 1
        if self._repeated:
            self._seen.add(token)


def choose(logits: torch.Tensor, samplers: Sequence[RequestSampler]) -> list[int | None]:
    """Choose the next token of every row of logits [rows, vocab].

    A row whose logits are not finite gives None: its model is broken, and a token would hide that.
    """
    if logits.device.type != "cpu" and all(s.params.greedy and not s.changes_logits for s in samplers):
        best, tokens = logits.max(dim=-1)
        return _where_finite(tokens.tolist(), torch.isfinite(best).tolist())
    rows = _changed(logits.float().cpu().numpy(), samplers)
    best_tokens = rows.argmax(axis=-1)
    finite = np.isfinite(rows[np.arange(len(rows)), best_tokens]).tolist()
    chosen = best_tokens.tolist()
    for row, token in _drawn(rows, [(row, each) for row, each in enumerate(samplers) if finite[row]]):
        chosen[row] = token
    accepted = _where_finite(chosen, finite)
    for sampler, choice in zip(samplers, accepted, strict=True):
        if choice is not None and sampler.changes_logits:
            sampler.observe(choice)
    return accepted


def _where_finite(tokens: list[int], finite: list[bool]) -> list[int | None]:
    return [token if known else None for token, known in zip(tokens, finite, strict=True)]


def _changed(logits: np.ndarray, samplers: Sequence[RequestSampler]) -> np.ndarray:
    rows = [row for row, sampler in enumerate(samplers) if sampler.changes_logits]
    if rows:
        logits = logits.copy()
    for row in rows:
        samplers[row].change(logits[row])
    return logits


def _drawn(rows: np.ndarray, samplers: Sequence[tuple[int, RequestSampler]]) -> Iterator[tuple[int, int]]:
    """Draw a token for each row of logits [rows, vocab] whose request draws at all; gives (row, token).

    Rows of which nothing is left out are drawn together, half a megabyte at a time: that costs what a search of their
    cumulative sums did, one by one (2.6 ms for 64 rows of 8,192); a row alone costs 46 µs more than that.
    """
    plain = []
    for row, sampler in samplers:
        if sampler.params.greedy:
            continue
        if _is_truncated(sampler.params):
            weights = weights_of(rows[row], sampler.params.temperature)
            kept = kept_tokens(weights, sampler.params)
            yield row, int(kept[_first(weights[None, kept], _numbers([sampler]), kept)[0]])
        else:
            plain.append((row, sampler))
    together = max(1, ELEMENTS // rows.shape[1])
    for some in (plain[at : at + together] for at in range(0, len(plain), together)):
        weights = _weights(rows[[row for row, _ in some]], [sampler.params.temperature for _, sampler in some])
        drawn = _drawn_by_runs(weights, _numbers([sampler for _, sampler in some]))
        yield from zip((row for row, _ in some), drawn.tolist(), strict=True)


def _numbers(samplers: Sequence[RequestSampler]) -> np.ndarray:
    return np.array([sampler.draw() for sampler in samplers], np.uint64)


def weights_of(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Return the probabilities of a row of logits [vocab], not normalised: the best weighs 1."""
    return _weights(logits[None], [temperature])[0]


def _weights(logits: np.ndarray, temperatures: Sequence[float]) -> np.ndarray:
    """Return the same of rows [n, vocab], each at its temperature."""
    inverse = np.array([min(1 / temperature, 1e38) for temperature in temperatures], np.float32)[:, None]
    with np.errstate(over="ignore"):  # next to nothing as temperature: all but the best weigh 0
        scaled = (logits - logits.max(axis=1, keepdims=True)) * inverse
    return np.exp(scaled, out=scaled)


def kept_tokens(weights: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Return the tokens that top_k, top_p and min_p leave of a row of weights [vocab], best first."""
    vocab = len(weights)
    if 0 < params.top_k < vocab:
        tokens = _best(weights, params.top_k)
        return tokens[: _kept(weights[tokens], weights[tokens].sum(dtype=np.float64), params)]
    total = weights.sum(dtype=np.float64)
    for count in (min(CANDIDATES, vocab), vocab):
        tokens = _best(weights, count)
        kept = _kept(weights[tokens], total, params)
        if kept < count:  # else the next one may have to be kept too
            break
    return tokens[:kept]


def _best(weights: np.ndarray, count: int) -> np.ndarray:
    """Return the tokens of the `count` highest weights, best first."""
    if count < len(weights):
        tokens = np.argpartition(weights, len(weights) - count)[-count:]
        return tokens[np.argsort(-weights[tokens])]
    return np.argsort(-weights)


def _kept(weights: np.ndarray, total: float, params: SamplingParams) -> int:
    """Return how many of the weights, best first, top_p and min_p leave; `total` is that of all before top_p."""
    kept = len(weights)
    if params.top_p < 1.0:
        # a token is kept while those better than it do not reach top_p; the first always is
        kept = int(weights.cumsum(dtype=np.float64).searchsorted(params.top_p * total)) + 1
    if params.min_p > 0.0:
        kept = min(kept, int((-weights).searchsorted(-params.min_p, side="right")))
    return min(kept, len(weights))


def _is_truncated(params: SamplingParams) -> bool:
    """Whether the request leaves unlikely tokens out, so that they have to be ranked."""
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _drawn_by_runs(weights: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return an index for each row of weights [n, vocab], drawn by them: first a run by its sum, then one of the run.

    Args:
        numbers: 64 bits of chance for each row, uint64 [n].
    """
    count, vocab = weights.shape
    whole = vocab // RUN * RUN
    sums = weights[:, :whole].reshape(count, -1, RUN).sum(axis=2)
    if whole < vocab:
        sums = np.concatenate([sums, weights[:, whole:].sum(axis=1, keepdims=True)], axis=1)
    start = RUN * _first(sums, numbers, np.arange(sums.shape[1]) + RUNS)
    tokens = start[:, None] + np.arange(RUN)
    inside = np.take_along_axis(weights, np.minimum(tokens, vocab - 1), axis=1) * (tokens < vocab)
    return start + _first(inside, numbers, tokens)


def _first(weights: np.ndarray, numbers: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Return for each row the index that comes first in a race: each waits an exponential time, its weight the rate.

    That draws by the weights (Gumbel-max in other words; Maddison, Tarlow and Minka 2014). Each waits by a number of
    its own, a hash of the row's number and its name, so that neither the order nor the others' rounding matters: two
    replicas, or two batches, that round a weight otherwise choose alike, but where two waits are as good as equal. A
    cumulative sum has a border for each token, and every border moves with every rounding.

    Args:
        weights: [n, k], in each row at least one above 0; one of 0 is never first.
        numbers: 64 bits of chance for each row, uint64 [n].
        names: [k] or [n, k], whole numbers that tell the weights apart, wherever they stand.
    """
    with np.errstate(divide="ignore"):
        waits = -np.log(_uniforms(numbers[:, None], names)) / weights
    return waits.argmin(axis=1)


def _uniforms(numbers: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Return a uniform number in (0, 1) for each number with each name, float64.

    By SplitMix64 (Steele, Lea and Flood 2014); arrays of uint64 wrap around without a word.
    """
    mixed = numbers + (names.astype(np.uint64) + ONE) * GOLDEN
    mixed = (mixed ^ (mixed >> SHIFTS[0])) * MIX[0]
    mixed = (mixed ^ (mixed >> SHIFTS[1])) * MIX[1]
    return ((mixed ^ (mixed >> SHIFTS[2])) >> SHIFTS[3]).astype(np.float64) * 2.0**-52 + 2.0**-53
