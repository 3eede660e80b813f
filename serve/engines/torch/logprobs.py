"""How likely the model itself found tokens: before bias, penalties, temperature and masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from serve.engines.protocol import TokenLogprobs


def report(logits: torch.Tensor, tokens: Sequence[int], alternatives: Sequence[int]) -> list[TokenLogprobs]:
    """Return, for each row of logits [rows, vocab], the given token's log-probability and the best tokens'.

    `alternatives` says how many of the best to report for each row.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(max(alternatives), logprobs.shape[-1]), dim=-1)
    rows = zip(tokens, own, alternatives, values.tolist(), ids.tolist(), strict=True)
    return [
        TokenLogprobs(token, logprob, tuple(zip(best[:count], values[:count], strict=True)))
        for token, logprob, count, values, best in rows
    ]
