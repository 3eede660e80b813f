"""Logits → tokens, each request by its own rules.

Everything works row by row, and a request draws one number a token from a generator of its own, so the token chosen
depends on the request's own logits alone, whatever else is in the batch. The order of the rules is that of
transformers' logits processors: schema, bias, penalties, temperature, top_k, top_p, min_p.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch

from serve.engine import SamplingParams
from serve.torch_engine.grammar import Constraint

CANDIDATES = 256
"""Most likely tokens looked at first for top_k, top_p and min_p; a row that needs more gets the whole vocabulary."""


class RequestSampler:
    """What one request's sampling remembers from token to token: its generator and the tokens it has seen."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab_size: int,
        constraint: Constraint | None = None,
    ) -> None:
        self.params = params
        self.constraint = constraint
        # random.seed takes the absolute value of an integer
        self._generator = random.Random(None if params.seed is None else params.seed % 2**64)
        self._counts: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None
        self._bias: tuple[torch.Tensor, torch.Tensor] | None = None
        if params.presence_penalty or params.frequency_penalty:
            self._counts = torch.zeros(vocab_size)
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[torch.tensor(prompt)] = True
        if params.logit_bias:
            tokens = torch.tensor(list(params.logit_bias))
            self._bias = tokens, torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self.changes_logits = constraint is not None or any(
            kept is not None for kept in (self._counts, self._seen, self._bias)
        )

    def draw(self) -> float:
        """Return the request's next uniform number in [0, 1)."""
        return self._generator.random()

    def change(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the row [vocab] with the schema's mask, bias and penalties applied."""
        if self.constraint is not None:
            logits = logits.masked_fill(self.constraint.forbidden(), float("-inf"))
        if self._bias is not None:
            logits = logits.index_add(0, *self._bias)
        if self._seen is not None:
            penalty = self.params.repetition_penalty
            repeated = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, repeated, logits)
        if self._counts is not None:
            logits = logits - self.params.frequency_penalty * self._counts
            logits = logits - self.params.presence_penalty * (self._counts > 0)
        return logits

    def observe(self, token: int) -> None:
        """Remember a chosen token for the penalties and the schema."""
        if self.constraint is not None:
            self.constraint.observe(token)
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True


def choose(logits: torch.Tensor, samplers: Sequence[RequestSampler]) -> list[int | None]:
    """Choose the next token of every row of logits [rows, vocab].

    A row whose logits are not finite gives None: its model is broken, and a token would hide that.
    """
    logits = _changed(logits, samplers)
    best, chosen = best_of(logits)
    for truncated in (False, True):
        rows = [i for i, s in enumerate(samplers) if not s.params.greedy and is_truncated(s.params) == truncated]
        if rows:
            own = logits if len(rows) == len(samplers) else logits[rows]
            for row, token in zip(rows, _draw(own.float(), [samplers[i] for i in rows], truncated), strict=True):
                chosen[row] = token
    accepted: list[int | None] = [token if finite else None for token, finite in zip(chosen, best, strict=True)]
    for sampler, choice in zip(samplers, accepted, strict=True):
        if choice is not None and sampler.changes_logits:
            sampler.observe(choice)
    return accepted


def best_of(logits: torch.Tensor) -> tuple[list[bool], list[int]]:
    """Return, for each row, whether its best logit is finite, and its token; the first of equals."""
    if logits.dtype == torch.float32 and logits.device.type == "cpu":
        # numpy's argmax is vectorised, torch's is not: a fifth of the time at 8,192 and more tokens
        rows = logits.numpy()
        tokens = rows.argmax(axis=-1)
        return np.isfinite(rows[np.arange(len(rows)), tokens]).tolist(), tokens.tolist()
    best, tokens = logits.max(dim=-1)
    return torch.isfinite(best).tolist(), tokens.tolist()


def is_truncated(params: SamplingParams) -> bool:
    """Whether the request leaves unlikely tokens out, so that its candidates have to be ranked."""
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _changed(logits: torch.Tensor, samplers: Sequence[RequestSampler]) -> torch.Tensor:
    rows = [i for i, sampler in enumerate(samplers) if sampler.changes_logits]
    if rows:
        logits = logits.to(torch.float32, copy=True)
    for row in rows:
        # on the CPU, where what a request remembers lies
        logits[row] = samplers[row].change(logits[row].cpu()).to(logits.device)
    return logits


def _draw(logits: torch.Tensor, samplers: Sequence[RequestSampler], truncated: bool) -> list[int]:
    """Draw one token a row from the rows' own distributions."""
    params = [sampler.params for sampler in samplers]
    uniform = torch.tensor([sampler.draw() for sampler in samplers], dtype=torch.float64, device=logits.device)
    if not truncated:
        return _inverse_cdf(torch.softmax(logits / _column(params, "temperature", logits), dim=-1), uniform).tolist()
    tokens = torch.empty(len(params), dtype=torch.long, device=logits.device)
    rows = torch.arange(len(params), device=logits.device)
    for candidates in (min(CANDIDATES, logits.shape[-1]), logits.shape[-1]):
        probabilities, ids = candidates_of(logits[rows], [params[i] for i in rows.tolist()], candidates)
        picked = _inverse_cdf(probabilities, uniform[rows])
        tokens[rows] = ids.gather(1, picked[:, None])[:, 0]
        # a row that keeps even its last candidate may have to keep more
        rows = rows[probabilities[:, -1] > 0]
        if len(rows) == 0:
            break
    return tokens.tolist()


def candidates_of(
    logits: torch.Tensor, params: Sequence[SamplingParams], candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (probabilities, token ids), both [rows, candidates], best first; what is left out has probability 0.

    Exact when a row's last candidate is left out, or when all of the vocabulary are candidates.
    Probabilities of a row sum to at most 1: they are not normalised again after the last cut.
    """
    scaled = logits / _column(params, "temperature", logits)
    values, ids = scaled.topk(candidates, dim=-1)
    rank = torch.arange(candidates, device=logits.device)
    top_k = torch.tensor([p.top_k if p.top_k > 0 else logits.shape[-1] for p in params], device=logits.device)[:, None]
    values = values.masked_fill(rank >= top_k, float("-inf"))
    total = torch.where(top_k < logits.shape[-1], values.logsumexp(-1, True), scaled.logsumexp(-1, True))
    probabilities = torch.exp(values - total)
    better = probabilities.cumsum(dim=-1, dtype=torch.float64) - probabilities
    # a top_p of 1 keeps everything, also where rounding has let the sum reach 1 early
    top_p = _column(params, "top_p", better)
    left_out = (better >= top_p) & (top_p < 1.0)
    left_out |= probabilities < _column(params, "min_p", logits) * probabilities[:, :1]
    return probabilities.masked_fill(left_out, 0.0), ids


def _inverse_cdf(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return, for each row, the first index where the cumulative sum passes uniform times the row's sum.

    Never an index of probability 0: the sum does not rise there.
    """
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    return (cumulative > uniform[:, None] * cumulative[:, -1:]).int().argmax(dim=-1)


def _column(params: Sequence[SamplingParams], name: str, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([getattr(p, name) for p in params], dtype=like.dtype, device=like.device)[:, None]
