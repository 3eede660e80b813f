"""Compare a runner with the model's own eager attention, so that an architecture it does not reproduce is refused.

A short text goes through the cache as two chunks of a prompt and a decode step, in blocks that do not follow each
other, beside a second sequence that must not disturb it.
"""

from __future__ import annotations

from typing import Any

import torch

from cluster.errors import UserError
from jobs.tasks import causality
from serve.engines.protocol import GenerationRequest
from serve.engines.torch.batch import Runner, build
from serve.engines.torch.blocks import BLOCK
from serve.engines.torch.scheduler import Chunk, Sequence, Step

TOKENS = BLOCK + 8
"""Length of the text: one block and a bit."""
BLOCKS = 5
"""Blocks that the comparison uses, block 0 included."""


class UnsupportedArchitecture(UserError, ValueError):
    """The model cannot run in the embedded engine; the message says why and what to use instead."""


def check_sight(model: Any, longest: int) -> None:
    """Raise UnsupportedArchitecture for a model that sees tokens that come later, as an encoder does.

    Its texts would be nonsense, and with one layer its last logits are those of a causal model.
    """
    if causality.sees_ahead(model, longest):
        raise UnsupportedArchitecture(
            f"{type(model).__name__} sees the tokens that it is to predict: it is no causal model as it is configured, "
            "and generates no text. Where its config has is_decoder, train or export it with is_decoder: true; serve "
            "an encoder as text-classification"
        )


@torch.inference_mode()
def reference_logits(model: Any, longest: int) -> torch.Tensor:
    """Return the last logits [vocab] of the text that `compare` runs, by the model's own eager attention."""
    model.eval()
    model.set_attn_implementation("eager")
    tokens = torch.tensor([_text(model, longest)], device=model.device)
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits[0, -1]
    return logits.float().cpu()


@torch.inference_mode()
def compare(runner: Runner, model: Any, expected: torch.Tensor, longest: int, tolerance: float) -> None:
    """Raise UnsupportedArchitecture where the runner's logits differ from `expected` [vocab], of `reference_logits`.

    `tolerance` is for the Euclidean norm of the difference over that of `expected`.
    """
    tokens = _text(model, longest)
    text = Sequence(GenerationRequest("check", tokens), max_tokens=1)
    other = Sequence(GenerationRequest("other", tokens[::-1]), max_tokens=1)
    text.blocks.extend((3, 1))
    other.blocks.extend((4, 2))
    middle, last = len(tokens) // 2, len(tokens) - 1
    for start, end in ((0, middle), (middle, last)):
        if start < end:
            runner.run(build(Step([], [Chunk(other, start, end, False), Chunk(text, start, end, False)])))
    chunks = [Chunk(other, last, last + 1, True), Chunk(text, last, last + 1, True)]
    actual = runner.run(build(Step(chunks, []))).logits[1].float().cpu()
    error = float((actual - expected).norm() / expected.norm())
    if not error < tolerance:
        reason = f"its own attention gives other logits (relative difference {error:.2g})"
        raise unsupported(model, reason)


def unsupported(model: Any, reason: str) -> UnsupportedArchitecture:
    name = type(model).__name__
    return UnsupportedArchitecture(f"{name} cannot run in the embedded engine: {reason}; serve this model with vLLM")


def _text(model: Any, longest: int) -> tuple[int, ...]:
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    return tuple((7 * at + 1) % vocabulary for at in range(min(TOKENS, longest)))
