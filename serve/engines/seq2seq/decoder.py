"""An encoder-decoder of transformers, in two moves: read sources, and choose the next token of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from serve.engines.seq2seq.positions_internals import placed
from serve.engines.seq2seq.rows import Rows


class Decoder:
    """Takes the model over: do not use it for anything else. Called from one thread."""

    def __init__(self, model: Any, start: int, padding: int) -> None:
        """`start` is the token that the decoder begins with."""
        self.model = model.eval()
        self.start = start
        self.padding = padding
        self._encoded: type[Any] | None = None
        """What its encoder gives; the decoder of a mixture of experts asks more of it than its last hidden state."""
        self._positions = placed(model)

    @torch.inference_mode()
    def begin(self, sources: Sequence[Sequence[int]], generated: Sequence[int] = ()) -> tuple[Rows, torch.Tensor]:
        """Read N sources, and behind the start token what was generated already, the same for all.

        Returns:
            A row for each, and the logits (N, V) of the token that follows.
        """
        lengths = [len(source) for source in sources]
        ids = torch.full((len(sources), max(lengths)), self.padding)
        for row, source in zip(ids, sources, strict=True):
            row[: len(source)] = torch.tensor(source)
        mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        encoded = self.model.get_encoder()(input_ids=ids, attention_mask=mask)
        self._encoded = type(encoded)
        read = torch.tensor([[self.start, *generated]] * len(sources), device=self.model.device)
        output = self.model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=read, use_cache=True)
        rows = Rows.of(output.past_key_values, [read.shape[1]] * len(sources), lengths)
        return rows, output.logits[:, -1]

    @torch.inference_mode()
    def step(self, rows: Rows, tokens: Sequence[int]) -> tuple[Rows, torch.Tensor]:
        """Go one token on.

        Args:
            tokens: the last one of each of the R rows, which is not in the cache yet.

        Returns:
            The rows with it, and the logits (R, V) of the token that follows.
        """
        assert self._encoded is not None, "rows come from `begin`"
        device, mask = self.model.device, rows.source_mask()
        # The sources' keys and values are in the cache: of what the encoder gave only the shape is looked at.
        nothing = torch.zeros((), dtype=self.model.dtype, device=device)
        encoded = self._encoded(last_hidden_state=nothing.expand(*mask.shape, self.model.config.hidden_size))
        alike = len(set(rows.lengths)) == 1
        if self._positions is not None and not alike:
            self._positions.rows = torch.tensor(rows.lengths, device=device)
        try:
            output = self.model(
                encoder_outputs=encoded,
                attention_mask=mask.to(device),
                decoder_input_ids=torch.tensor(tokens, device=device)[:, None],
                decoder_attention_mask=None if alike else rows.own_mask().to(device),
                past_key_values=rows.cache(),
                use_cache=True,
            )
        finally:
            if self._positions is not None:
                self._positions.rows = None
        lengths = [length + 1 for length in rows.lengths]
        return Rows.of(output.past_key_values, lengths, rows.sources), output.logits[:, -1]
