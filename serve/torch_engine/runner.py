"""One step on the device: the step's tokens through the model, the logits of the rows that complete.

`check` runs a short text through the slots and through the model's own eager attention at start, and compares: an
architecture whose attention this engine does not reproduce is refused by name instead of answering nonsense.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch

from serve.engine import GenerationRequest
from serve.torch_engine import attention, linear
from serve.torch_engine.kv_cache import SlotCache
from serve.torch_engine.scheduler import Chunk, Move, Sequence, Step

CHECK_TOKENS = 12
"""Length of the text that `check` compares."""


class UnsupportedArchitecture(ValueError):
    """The model cannot run in the embedded engine; the message says why and what to use instead."""

    exit_code = 2


class ModelRunner:
    """A transformers causal model over a SlotCache. It takes the model over: its attention and linear layers change."""

    def __init__(self, model: Any, slots: int, max_context: int) -> None:
        self.model = model
        self.device = torch.device(model.device)
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        self.cache = SlotCache(slots, max_context, model.dtype)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def prepare(self) -> None:
        """Put the slots' attention and packed weights in, allocate the cache, and check the result.

        Raises UnsupportedArchitecture where the model's own attention gives other logits.
        """
        attention.register()
        name = type(self.model).__name__
        kinds = set(getattr(self.model.config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        if kinds:
            raise _unsupported(name, f"it has layers of type {', '.join(sorted(kinds))}")
        self.model.eval()
        self.model.set_attn_implementation("eager")
        tokens = torch.arange(min(CHECK_TOKENS, self.cache.max_context)) % self.vocab_size
        with torch.inference_mode():
            expected = self.model(input_ids=tokens[None].to(self.device), use_cache=False).logits[0, -1].float()
            linear.pack(self.model)
            self.model.set_attn_implementation(attention.NAME)
            if self.model.config._attn_implementation != attention.NAME:
                raise _unsupported(name, "it does not let its attention function be replaced")
            try:
                actual = self._check_logits(tokens.tolist())
            except (attention.UnsupportedAttention, TypeError) as error:
                raise _unsupported(name, str(error)) from error
        self._compare(name, expected, actual)

    def _check_logits(self, tokens: list[int]) -> torch.Tensor:
        """Run a text as two chunks of a prompt and one decode step; return its last logits."""
        sequence = Sequence(GenerationRequest("check", tuple(tokens)), max_tokens=1)
        middle, last = len(tokens) // 2, len(tokens) - 1
        for start, end in ((0, middle), (middle, last)):
            if start < end:
                self.forward(Step((), (Chunk(sequence, 0, start, end),)))
        return self.forward(Step((Chunk(sequence, 0, last, last + 1),), ()))[0].float()

    def _compare(self, name: str, expected: torch.Tensor, actual: torch.Tensor) -> None:
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.1
        error = float((actual - expected).norm() / expected.norm())
        if not error < tolerance:
            raise _unsupported(name, f"its own attention gives other logits (relative difference {error:.2g})")

    @torch.inference_mode()
    def forward(self, step: Step) -> torch.Tensor:
        """Run the step's tokens; return the logits [completing chunks, vocab]."""
        chunks = step.chunks
        positions = [position for chunk in chunks for position in range(chunk.start, chunk.end)]
        slots = [chunk.slot for chunk in chunks for _ in range(chunk.start, chunk.end)]
        tokens = [token for chunk in chunks for token in chunk.sequence.tokens[chunk.start : chunk.end]]
        at = torch.tensor(positions, device=self.device)
        self.cache.write_at(torch.tensor(slots, device=self.device), at)
        keep = torch.tensor(_last_tokens(chunks), dtype=torch.long, device=self.device)
        output = self.model(
            input_ids=torch.tensor([tokens], device=self.device),
            position_ids=at[None],
            past_key_values=self.cache,
            use_cache=True,
            layout=_layout(step, self.device, self.model.dtype),
            **({"logits_to_keep": keep} if self._keeps_logits else {}),
        )
        logits: torch.Tensor = output.logits[0] if self._keeps_logits else output.logits[0, keep]
        return logits

    @torch.inference_mode()
    def apply(self, moves: Iterable[Move]) -> None:
        """Copy slots as the scheduler says."""
        for move in moves:
            self.cache.move(move.source, move.target, move.length)


def _last_tokens(chunks: Iterable[Chunk]) -> list[int]:
    """Return where in the flat row the completing chunks end."""
    ends, offset = [], 0
    for chunk in chunks:
        offset += chunk.end - chunk.start
        if chunk.completes:
            ends.append(offset - 1)
    return ends


def _layout(step: Step, device: torch.device, dtype: torch.dtype) -> attention.Layout:
    segments, offset = [], len(step.decode)
    for chunk in step.prefill:
        segments.append(attention.Segment(chunk.slot, offset, chunk.start, chunk.end - chunk.start))
        offset += chunk.end - chunk.start
    return attention.Layout([chunk.end for chunk in step.decode], segments, device, dtype)


def _unsupported(name: str, reason: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(f"{name} cannot run in the embedded engine: {reason}; serve this model with vLLM")
