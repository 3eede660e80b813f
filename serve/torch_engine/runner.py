"""TorchRunner: one step of any transformers causal decoder, through its own modules with paged attention."""

from __future__ import annotations

import inspect
import logging
import time
from typing import Any

import torch

from serve.torch_engine import attention, linear
from serve.torch_engine.attention import Layout
from serve.torch_engine.batch import Batch, build
from serve.torch_engine.blocks import BLOCK
from serve.torch_engine.check import BLOCKS, UnsupportedArchitecture, unsupported
from serve.torch_engine.kv_cache import LayerShape, PagedCache, ShapeProbe
from serve.torch_engine.scheduler import Chunk, Sequence, Step

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
        self.compile_s = 0.0
        """What compiling took, once prepared."""

    @property
    def cache_memory_bytes(self) -> int:
        return self._cache.memory_bytes if self._cache else 0

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
        linear.pack(self._model, self._weights)
        if self._compiled:
            self._compile()
        return blocks

    def run(self, batch: Batch) -> torch.Tensor:
        try:
            return self._run(batch)
        except (attention.UnsupportedAttention, TypeError) as error:
            raise unsupported(self._model, str(error)) from error

    @torch.inference_mode()
    def _run(self, batch: Batch) -> torch.Tensor:
        layout = Layout(batch, self._device)
        assert self._cache is not None
        self._cache.rows = layout.rows
        keep = batch.logits_at.to(self._device).long()
        output = self._forward(
            input_ids=batch.tokens.to(self._device).long()[None],
            position_ids=batch.positions.to(self._device).long()[None],
            past_key_values=self._cache,
            use_cache=True,
            layout=layout,
            **({"logits_to_keep": keep} if self._keeps_logits else {}),
        )
        logits: torch.Tensor = output.logits[0] if self._keeps_logits else output.logits[0, keep]
        return logits

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
        self._model(input_ids=torch.ones(1, PROBE_TOKENS, dtype=torch.long, device=self._device), past_key_values=probe)
        if not probe.shapes:
            raise unsupported(self._model, "its layers do not write to transformers' cache")
        return probe.shapes

    def _compile(self) -> None:
        """Compile the modules around attention, for any number of rows, and run them once at each kind of step."""
        began = time.perf_counter()
        self._forward = torch.compile(self._model, dynamic=True)
        for rows in (1, 3, 5):
            self._run(build(_rows(rows)))
        self.compile_s = time.perf_counter() - began
        logger.info("torch.compile took %.1f s", self.compile_s)


def _rows(rows: int) -> Step:
    """Return a step of one prompt with so many tokens, all of them in block 0."""
    from serve.engine import GenerationRequest

    sequence = Sequence(GenerationRequest("warm", (1,) * rows), max_tokens=1)
    sequence.blocks.append(0)
    return Step([], [Chunk(sequence, 0, rows, True)])
