"""TorchRunner: one step of any transformers causal decoder, through its own modules with paged attention."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad

from serve.engines.torch import attention, linear
from serve.engines.torch.attention import Layout
from serve.engines.torch.batch import Batch, Outputs, build
from serve.engines.torch.blocks import BLOCK
from serve.engines.torch.check import BLOCKS, UnsupportedArchitecture, unsupported
from serve.engines.torch.kv_cache import LayerShape, PagedCache, ShapeProbe
from serve.engines.torch.scheduler import Chunk, Sequence, Step

__all__ = ["TorchRunner", "UnsupportedArchitecture"]

PROBE_TOKENS = 4
logger = logging.getLogger(__name__)


class TorchRunner:
    """Takes the model over: its attention and linear layers change."""

    name = "torch"

    def __init__(self, model: Any, weights: linear.Weights = "bf16", compiled: bool = False) -> None:
        self._model = model
        self._weights = weights
        self._compiled = compiled
        self._forward: Any = model
        self._device = torch.device(model.device)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._cache: PagedCache | None = None
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        self.embeds = False
        self.compile_s = 0.0
        """What compiling took, once prepared."""

    @property
    def cache_memory_bytes(self) -> int:
        return self._cache.memory_bytes if self._cache else 0

    @property
    def cache(self) -> list[torch.Tensor]:
        """See Runner; each layer's keys, then its values, are [blocks, heads, BLOCK, width]."""
        return self._cache.tensors if self._cache else []

    def prepare(self, blocks: int, memory_bytes: int) -> int:
        """See Runner. Puts paged attention and packed weights in, and allocates the cache."""
        self._refuse_layer_types()
        shapes = self._layer_shapes()
        block_bytes = BLOCK * self._model.dtype.itemsize * sum(shape.numbers for shape in shapes)
        blocks = max(BLOCKS, min(blocks, memory_bytes // block_bytes))
        self._cache = PagedCache(shapes, blocks, self._model.dtype, self._device)
        attention.register()
        self._model.set_attn_implementation(attention.NAME)
        if self._model.config._attn_implementation != attention.NAME:
            raise unsupported(self._model, "it does not let its attention function be replaced")
        if self._compiled:
            self._compile()  # which packs weights itself, and cannot look into packed ones
        else:
            linear.pack(self._model, self._weights)
        return blocks

    def run(self, batch: Batch) -> Outputs:
        """See Runner: logits (L, vocabulary) and hidden states (E, hidden)."""
        try:
            return self._run(batch)
        except (attention.UnsupportedAttention, TypeError) as error:
            raise unsupported(self._model, str(error)) from error

    @torch.inference_mode()
    def _run(self, batch: Batch) -> Outputs:
        wanted = len(batch.logits_at)
        if self._compiled:
            batch = _at_least_two(batch)
        keep = batch.logits_at.to(self._device).long()
        # a compiled model does not run the hook
        forward = self._model if len(batch.hidden_at) else self._forward
        with attention.step(Layout(batch, self._device)), self._states(batch.hidden_at) as states:
            output = forward(
                input_ids=batch.tokens.to(self._device).long()[None],
                position_ids=batch.positions.to(self._device).long()[None],
                past_key_values=self._cache,
                use_cache=True,
                **({"logits_to_keep": keep} if self._keeps_logits else {}),
            )
        logits: torch.Tensor = output.logits[0] if self._keeps_logits else output.logits[0, keep]
        return Outputs(logits[:wanted], states[-1] if states else torch.empty(0, 0))

    def release(self) -> None:
        """Nothing: the modules' weights are the ones that compute."""

    def _refuse_layer_types(self) -> None:
        config = self._model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        if kinds:
            raise unsupported(self._model, f"it has layers of type {', '.join(sorted(kinds))}")

    @torch.inference_mode()
    def _layer_shapes(self) -> list[LayerShape]:
        """Learn from one small pass what each layer caches: configs name it in too many ways."""
        probe = ShapeProbe()
        tokens = torch.ones(1, PROBE_TOKENS, dtype=torch.long, device=self._device)
        with self._states(torch.arange(PROBE_TOKENS)) as states:
            self._model(input_ids=tokens, past_key_values=probe)
        self.embeds = bool(states)
        if not probe.shapes:
            raise unsupported(self._model, "its layers do not write to transformers' cache")
        return probe.shapes

    @contextmanager
    def _states(self, rows: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """Collect what the decoder gives to the head in a pass, [rows, hidden]; the outermost module's comes last.

        The head calls the base model in most architectures, and the decoder inside it in some (OPT).
        """
        states: list[torch.Tensor] = []
        below = {self._model.base_model, self._model.get_decoder()} - {self._model} if len(rows) else set()
        rows = rows.to(self._device).long()
        hooks = [
            module.register_forward_hook(lambda module, given, output: states.append(output[0][0, rows]))
            for module in below
        ]
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    def _compile(self) -> None:
        """Compile the model for any number of rows, attention apart, by running it once."""
        began = time.perf_counter()
        self._forward = torch.compile(self._model, dynamic=True)
        self._run(build(_rows(5)))
        self.compile_s = time.perf_counter() - began
        logger.info("torch.compile took %.1f s", self.compile_s)


def _at_least_two(batch: Batch) -> Batch:
    """Pad a batch to two tokens and two wanted rows: torch.compile makes a model of its own for one, and for none.

    The token added is written to block 0, which nobody reads.
    """
    tokens, wanted = max(0, 2 - len(batch.tokens)), max(0, 2 - len(batch.logits_at))
    return replace(
        batch,
        tokens=pad(batch.tokens, (0, tokens)),
        positions=pad(batch.positions, (0, tokens)),
        slots=pad(batch.slots, (0, tokens)),
        logits_at=pad(batch.logits_at, (0, wanted)),
    )


def _rows(rows: int) -> Step:
    """Return a step of one prompt with so many tokens, all of them in block 0."""
    from serve.engines.protocol import GenerationRequest

    sequence = Sequence(GenerationRequest("warm", (1,) * rows), max_tokens=1)
    sequence.blocks.append(0)
    return Step([], [Chunk(sequence, 0, rows, True)])
