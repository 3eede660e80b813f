"""Greedy decoding of a batch with an encoder-decoder of transformers, for measuring: the likeliest token at each step.

It asks for nothing of the generation config but the tokens that texts begin and end with, as the engine `seq2seq`
does, so that what is measured is what is served.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch


@torch.no_grad()
def decode(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, start: int, ends: Collection[int], most: int
) -> list[list[int]]:
    """Return the tokens of B texts, without those that begin and end them.

    Under ZeRO-3 all ranks take as many steps as the longest text of any: each step gathers weights from all.

    Args:
        model: with an encoder and a decoder, in evaluation mode.
        input_ids: (B, S) int64; attention_mask: (B, S) int64, 0 at padding.
        start: the token that the decoder begins with.
        most: tokens of a text.
    """
    encoded = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
    last = input_ids.new_full((len(input_ids), 1), start)
    ending = torch.tensor(sorted(ends), device=input_ids.device)
    over = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    cache, chosen, together = None, [], _is_divided(model)
    for _ in range(most):
        output = model(
            encoder_outputs=encoded,
            attention_mask=attention_mask,
            decoder_input_ids=last,
            past_key_values=cache,
            use_cache=True,
        )
        cache, last = output.past_key_values, output.logits[:, -1:].argmax(-1)
        over = over | torch.isin(last[:, 0], ending)
        chosen.append(last[:, 0].masked_fill(over, -1))
        if _all_over(over, together):
            break
    return [[token for token in row if token >= 0] for row in torch.stack(chosen, 1).tolist()] if chosen else []


def _is_divided(model: torch.nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _all_over(over: torch.Tensor, together: bool) -> bool:
    if not together:
        return bool(over.all())
    running = (~over).any().to(torch.int32)
    torch.distributed.all_reduce(running, op=torch.distributed.ReduceOp.MAX)
    return not bool(running)
