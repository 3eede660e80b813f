"""NativeRunner: a step of a known decoder as one C++ call, on its own few threads."""

from __future__ import annotations

import ctypes
import logging
import weakref
from typing import Any

import torch
from torch.nn.functional import pad

from serve.engines.torch.batch import Batch, Outputs
from serve.engines.torch.blocks import BLOCK
from serve.engines.torch.check import BLOCKS, unsupported
from serve.engines.torch.linear import Weights
from serve.engines.torch.native import build, library, structure
from serve.engines.torch.native.library import CBatch, CLayer, CModel, CNorm, pointer
from serve.engines.torch.native.structure import Decoder, LayerWeights, NormWeights
from serve.engines.torch.native.weights import DEPTH, Packed, fused_heads, fused_up, pack, up_to, widened_out

logger = logging.getLogger(__name__)
HEAD_MULTIPLE = 32
"""What the kernels pad a head's width to."""


def refusal(model: Any, weights: Weights = "bf16") -> str | None:
    """Return why this runner cannot serve the model on this machine, or None. Compiles the kernels if need be."""
    reason = build.refusal()
    if reason is not None:
        return reason
    try:
        library.load()
        structure.read(model, max_context=1)
    except (build.BuildError, structure.Unknown, OSError) as error:
        return str(error)
    return None


class NativeRunner:
    """Takes the model over: `release` empties the weights that were packed.

    Activations between linear layers are bf16, sums and the residual stream float32.
    """

    name = "native"
    embeds = True

    def __init__(self, model: Any, threads: int, weights: Weights = "bf16", max_context: int | None = None) -> None:
        self._model = model
        self._threads = threads
        self._weights = weights
        self._max_context = max_context
        self._kept: list[Any] = []
        """What the C structs point to."""
        self.cache: list[torch.Tensor] = []
        self._engine: int | None = None
        self.cache_memory_bytes = 0
        self.weight_bytes = 0
        """Bytes of packed weights, which a step of one token reads once."""
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        self.hidden_size = int(model.config.get_text_config().hidden_size)

    def prepare(self, blocks: int, memory_bytes: int) -> int:
        """See Runner. Packs the weights and allocates the cache."""
        try:
            decoder = structure.read(self._model, self._max_context)
        except structure.Unknown as error:
            raise unsupported(self._model, str(error)) from error
        width = up_to(decoder.head_dim, HEAD_MULTIPLE)
        layer_bytes = 2 * decoder.kv_heads * width * BLOCK * 2
        blocks = max(BLOCKS, min(blocks, memory_bytes // (layer_bytes * len(decoder.layers))))
        self.cache_memory_bytes = blocks * layer_bytes * len(decoder.layers)
        model = self._describe(decoder, width, blocks)
        self._engine = library.load().tandem_create(ctypes.byref(model), self._threads)
        weakref.finalize(self, library.load().tandem_destroy, self._engine)
        return blocks

    def run(self, batch: Batch) -> Outputs:
        """See Runner: logits (L, vocabulary) and hidden states (E, hidden), both float32."""
        logits = torch.empty(len(batch.logits_at), self.vocab_size)
        hidden = torch.empty(len(batch.hidden_at), self.hidden_size)
        tensors = (
            *(batch.tokens, batch.positions, batch.slots, batch.query_start),
            *(batch.context, batch.blocks, batch.logits_at, batch.hidden_at),
        )
        step = CBatch(
            *(len(batch.tokens), len(batch.context), batch.blocks.shape[1], len(batch.logits_at)),
            *(len(batch.hidden_at), 0),
            *(pointer(tensor) for tensor in tensors),
        )
        library.load().tandem_step(self._engine, ctypes.byref(step), pointer(logits), pointer(hidden))
        return Outputs(logits, hidden)

    def release(self) -> None:
        """Empty the model's linear layers; a weight that is also the embedding stays for that use."""
        embedding = self._model.get_input_embeddings().weight
        for module in self._model.modules():
            weight = getattr(module, "weight", None)
            if (
                weight is not None
                and weight is not embedding
                and weight.dim() == 2
                and module not in self._embeddings()
            ):
                module.weight = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16), requires_grad=False)

    def profile(self) -> dict[str, float]:
        """Return the seconds of linear layers, attention and the rest since the last call."""
        assert self._engine is not None
        return library.profile(self._engine)

    def _embeddings(self) -> list[Any]:
        return [module for module in self._model.modules() if isinstance(module, torch.nn.Embedding)]

    def _describe(self, decoder: Decoder, width: int, blocks: int) -> CModel:
        layers = (CLayer * len(decoder.layers))()
        for index, layer in enumerate(decoder.layers):
            layers[index] = self._layer(decoder, layer, width, blocks)
        head = self._packed(pack(decoder.head, "bf16"))
        first = decoder.layers[0]
        rotary_dim = 0 if first.rotary is None else 2 * decoder.rotary[first.rotary][0].shape[1]
        self._kept.append(layers)
        return CModel(
            layers=len(decoder.layers),
            hidden=decoder.embedding.shape[1],
            heads=decoder.heads,
            kv_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            head_width=width,
            rotary_dim=rotary_dim,
            vocabulary=self.vocab_size,
            norm_kind=library.NORMS[decoder.norm_kind],
            activation=library.ACTIVATIONS[decoder.activation],
            gated=int(first.gate is not None),
            epsilon=decoder.epsilon,
            attention_scale=decoder.attention_scale,
            attention_softcap=decoder.attention_softcap,
            logit_softcap=decoder.logit_softcap,
            embedding_scale=decoder.embedding_scale,
            embedding=self._keep(decoder.embedding),
            positions=self._keep(decoder.positions),
            final_norm=self._norm(decoder.final_norm),
            head=head.struct,
            layer=layers,
        )

    def _layer(self, decoder: Decoder, layer: LayerWeights, width: int, blocks: int) -> CLayer:
        cosine, sine = decoder.rotary[layer.rotary] if layer.rotary else (None, None)
        cache = [library.allocate(blocks * decoder.kv_heads * width * BLOCK * 2) for _ in range(2)]
        self.cache += cache
        return CLayer(
            qkv=self._packed(pack(fused_heads(layer, decoder.head_dim, width), self._weights)).struct,
            out=self._packed(pack(widened_out(layer, decoder.head_dim, width), self._weights)).struct,
            up=self._packed(pack(fused_up(layer), self._weights)).struct,
            down=self._packed(pack(layer.down, self._weights)).struct,
            before_attention=self._norm(layer.before_attention),
            after_attention=self._norm(layer.after_attention),
            before_mlp=self._norm(layer.before_mlp),
            after_mlp=self._norm(layer.after_mlp),
            query_norm=self._keep(layer.query_norm),
            key_norm=self._keep(layer.key_norm),
            cosine=self._keep(cosine),
            sine=self._keep(sine),
            keys=pointer(cache[0]),
            values=pointer(cache[1]),
            window=layer.window,
        )

    def _packed(self, packed: Packed) -> Packed:
        self._kept.append(packed)
        self.weight_bytes += packed.data.nbytes
        return packed

    def _norm(self, norm: NormWeights | None) -> CNorm:
        if norm is None:
            return CNorm(None, None)
        return CNorm(*(self._keep(None if part is None else _padded(part)) for part in (norm.weight, norm.bias)))

    def _keep(self, tensor: torch.Tensor | None) -> int | None:
        """Return the tensor's address and hold on to it; float32 vectors must be contiguous already."""
        if tensor is not None:
            self._kept.append(tensor := tensor.contiguous())
        return pointer(tensor)


def _padded(vector: torch.Tensor) -> torch.Tensor:
    return pad(vector.float(), (0, up_to(len(vector), DEPTH) - len(vector))).contiguous()
