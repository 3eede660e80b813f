"""Logits → tokens, each request by its own rules.

Everything works row by row, and a request draws one number a token from a generator of its own, so the token chosen
depends on the request's own logits alone, whatever else is in the batch. The order of the rules is that of
transformers' logits processors: penalties, temperature, top_k, top_p, min_p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from serve.engine import SamplingParams

CANDIDATES = 256
"""Most likely tokens looked at first for top_k, top_p and min_p; a row that needs more gets the whole vocabulary."""


class RequestSampler:
    """What one request's sampling remembers from token to token: its generator and the tokens it has seen."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int, device: torch.device) -> None:
        self.params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._counts: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None
        if params.presence_penalty or params.frequency_penalty:
            self._counts = torch.zeros(vocab_size, device=device)
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.tensor(prompt, device=device)] = True

    @property
    def penalised(self) -> bool:
        return self._counts is not None or self._seen is not None

    def draw(self) -> float:
        """Return the request's next uniform number in [0, 1)."""
        return torch.rand((), generator=self._generator, dtype=torch.float64).item()

    def penalise(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the row [vocab] with repetition, frequency and presence penalties applied."""
        if self._seen is not None:
            penalty = self.params.repetition_penalty
            repeated = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, repeated, logits)
        if self._counts is not None:
            logits = logits - self.params.frequency_penalty * self._counts
            logits = logits - self.params.presence_penalty * (self._counts > 0)
        return logits

    def observe(self, token: int) -> None:
        """Remember a chosen token for the penalties."""
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True


def choose(logits: torch.Tensor, samplers: Sequence[RequestSampler]) -> list[int | None]:
    """Choose the next token of every row of logits [rows, vocab].

    A row whose logits are not finite gives None: its model is broken, and a token would hide that.
    """
    logits = logits.float()
    logits = _penalised(logits, samplers)
    best, tokens = logits.max(dim=-1)
    chosen: list[int | None] = list(tokens.tolist())
    for truncated in (False, True):
        rows = [i for i, s in enumerate(samplers) if not s.params.greedy and is_truncated(s.params) == truncated]
        if rows:
            drawn = _draw(logits[rows], [samplers[i] for i in rows], truncated)
            for row, token in zip(rows, drawn, strict=True):
                chosen[row] = token
    for row, finite in enumerate(torch.isfinite(best).tolist()):
        if not finite:
            chosen[row] = None
    for sampler, choice in zip(samplers, chosen, strict=True):
        if choice is not None:
            sampler.observe(choice)
    return chosen


def is_truncated(params: SamplingParams) -> bool:
    """Whether the request leaves unlikely tokens out, so that its candidates have to be ranked."""
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _penalised(logits: torch.Tensor, samplers: Sequence[RequestSampler]) -> torch.Tensor:
    rows = [i for i, sampler in enumerate(samplers) if sampler.penalised]
    if rows:
        logits = logits.clone()
    for row in rows:
        logits[row] = samplers[row].penalise(logits[row])
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
