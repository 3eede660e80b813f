"""What a transformers decoder computes, as plain tensors and numbers, read from its modules.

Only architectures whose forward pass is known term by term are read; `read` raises Unknown with the reason for all
others, and the engine compares the logits with the model's own before it serves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from serve.engines.torch.torch_internals import stored_int8

WIDEST_HEAD = 256
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class Unknown(ValueError):
    """The model has something that the native kernels do not compute; the message names it."""


@dataclass(frozen=True)
class Matrix:
    """A weight [out, in] with an optional bias [out]: bf16, or int8 with the scale of each row."""

    values: torch.Tensor
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def rows(self, change: Any) -> Matrix:
        """Apply `change`, which rearranges the first dimension, to the weight and all that goes with a row."""
        parts = (self.values, self.scale, self.bias)
        return Matrix(*(None if part is None else change(part) for part in parts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class NormWeights:
    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerWeights:
    queries: Matrix
    keys: Matrix
    values: Matrix
    out: Matrix
    gate: Matrix | None
    up: Matrix
    down: Matrix
    before_attention: NormWeights
    before_mlp: NormWeights
    after_attention: NormWeights | None = None
    after_mlp: NormWeights | None = None
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    rotary: str | None = "all"
    """Which of the decoder's rotary tables turns queries and keys."""
    window: int = 0


@dataclass(frozen=True)
class Decoder:
    layers: list[LayerWeights]
    embedding: torch.Tensor
    head: Matrix
    final_norm: NormWeights
    norm_kind: str
    epsilon: float
    activation: str
    heads: int
    kv_heads: int
    head_dim: int
    attention_scale: float
    positions: torch.Tensor | None = None
    embedding_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    rotary: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Cosines and sines [positions, head_dim / 2]."""


def read(model: Any, max_context: int | None = None) -> Decoder:
    """Return what the model computes. Raises Unknown."""
    reader = READERS.get(model.config.model_type)
    if reader is None:
        raise Unknown(f"architecture {model.config.model_type!r}; known are {', '.join(sorted(READERS))}")
    decoder: Decoder = reader(model, max_context or int(model.config.max_position_embeddings))
    _check(decoder)
    return decoder


def _check(decoder: Decoder) -> None:
    if decoder.head_dim > WIDEST_HEAD or decoder.head_dim % 2:
        raise Unknown(f"heads of {decoder.head_dim} numbers; even ones up to {WIDEST_HEAD} are known")
    if decoder.heads % decoder.kv_heads:
        raise Unknown(f"{decoder.heads} heads over {decoder.kv_heads} KV heads")
    if decoder.embedding.dtype != torch.bfloat16:
        raise Unknown(f"weights in {decoder.embedding.dtype}")


def _matrix(module: Any) -> Matrix:
    """Read exactly a linear layer: a subclass or a wrapper, such as an adapter, may compute something else."""
    from transformers.pytorch_utils import Conv1D

    if type(module) is not torch.nn.Linear and type(module) is not Conv1D:
        raise Unknown(f"a linear layer of type {type(module).__name__}")
    bias = None if module.bias is None else module.bias.detach()
    stored = stored_int8(module.weight)
    if stored is not None:
        return Matrix(stored[0], stored[1].float().flatten(), bias)
    if type(module.weight) is not torch.nn.Parameter or module.weight.dtype != torch.bfloat16:
        raise Unknown(f"weights of type {type(module.weight).__name__}, {module.weight.dtype}")
    weight = module.weight.detach()
    return Matrix(weight.T if isinstance(module, Conv1D) else weight, None, bias)


def _rotary_family(model: Any, max_context: int) -> Decoder:
    """Llama and what differs from it in few terms: Mistral, Qwen 2 and 3, Gemma 2 and 3."""
    config, body = model.config, model.model
    gemma = config.model_type.startswith("gemma")
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    layers = [_rotary_layer(layer, config, gemma) for layer in body.layers]
    return Decoder(
        layers=layers,
        embedding=body.embed_tokens.weight.detach(),
        head=_matrix(model.lm_head),
        final_norm=_norm(body.norm, gemma),
        norm_kind="rms",
        epsilon=config.rms_norm_eps,
        activation=_activation(config.hidden_activation if gemma else config.hidden_act),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        attention_scale=body.layers[0].self_attn.scaling,
        # transformers multiplies by the square root rounded to bf16
        embedding_scale=float(torch.tensor(config.hidden_size**0.5).bfloat16()) if gemma else 1.0,
        attention_softcap=getattr(config, "attn_logit_softcapping", None) or 0.0,
        logit_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
        rotary=_rotary_tables(body.rotary_emb, {layer.rotary for layer in layers}, max_context),
    )


def _rotary_layer(layer: Any, config: Any, gemma: bool) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    before_mlp = layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm
    normed = hasattr(attention, "q_norm")
    return LayerWeights(
        queries=_matrix(attention.q_proj),
        keys=_matrix(attention.k_proj),
        values=_matrix(attention.v_proj),
        out=_matrix(attention.o_proj),
        gate=_matrix(mlp.gate_proj),
        up=_matrix(mlp.up_proj),
        down=_matrix(mlp.down_proj),
        before_attention=_norm(layer.input_layernorm, gemma),
        before_mlp=_norm(before_mlp, gemma),
        after_attention=_norm(layer.post_attention_layernorm, gemma) if gemma else None,
        after_mlp=_norm(layer.post_feedforward_layernorm, gemma) if gemma else None,
        query_norm=_norm(attention.q_norm, gemma).weight if normed else None,
        key_norm=_norm(attention.k_norm, gemma).weight if normed else None,
        rotary=attention.layer_type if config.model_type == "gemma3_text" else "all",
        window=_window(attention, config),
    )


def _window(attention: Any, config: Any) -> int:
    """Return how many keys a query of this layer sees, 0 for all."""
    if config.model_type == "mistral":
        return config.sliding_window or 0
    return getattr(attention, "sliding_window", None) or 0


def _norm(module: Any, gemma: bool) -> NormWeights:
    weight = module.weight.detach().float()
    return NormWeights(1 + weight if gemma else weight)


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise Unknown(f"activation {name!r}")
    return ACTIVATIONS[name]


def _rotary_tables(module: Any, kinds: set[str | None], positions: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the tables of each kind, from the model's own module, in float32."""
    kind_of_rope = module.rope_type
    for rope in kind_of_rope.values() if isinstance(kind_of_rope, dict) else [kind_of_rope]:
        if rope in ("dynamic", "longrope"):
            raise Unknown(f"rotary embeddings of type {rope!r}, which change with the length of the text")
    tables = {}
    for kind in kinds:
        assert kind is not None
        arguments = {} if kind == "all" else {"layer_type": kind}
        cosine, sine = module(torch.zeros(1), torch.arange(positions)[None], **arguments)
        half = cosine.shape[-1] // 2
        tables[kind] = cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous()
    return tables


def _gpt2(model: Any, max_context: int) -> Decoder:
    config, body = model.config, model.transformer
    if config.scale_attn_by_inverse_layer_idx or config.add_cross_attention:
        raise Unknown("GPT-2 with attention scaled by layer, or with cross-attention")
    return Decoder(
        layers=[_gpt2_layer(block, config.hidden_size) for block in body.h],
        embedding=body.wte.weight.detach(),
        positions=body.wpe.weight.detach(),
        head=_matrix(model.lm_head),
        final_norm=_layer_norm(body.ln_f),
        norm_kind="layer",
        epsilon=config.layer_norm_epsilon,
        activation=_activation(config.activation_function),
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        attention_scale=body.h[0].attn.scaling,
    )


def _gpt2_layer(block: Any, hidden: int) -> LayerWeights:
    fused = _matrix(block.attn.c_attn)
    queries, keys, values = (fused.rows(lambda rows, at=at: rows[at : at + hidden]) for at in (0, hidden, 2 * hidden))
    return LayerWeights(
        queries=queries,
        keys=keys,
        values=values,
        out=_matrix(block.attn.c_proj),
        gate=None,
        up=_matrix(block.mlp.c_fc),
        down=_matrix(block.mlp.c_proj),
        before_attention=_layer_norm(block.ln_1),
        before_mlp=_layer_norm(block.ln_2),
        rotary=None,
    )


def _layer_norm(module: Any) -> NormWeights:
    return NormWeights(module.weight.detach().float(), module.bias.detach().float())


READERS = {
    "llama": _rotary_family,
    "mistral": _rotary_family,
    "qwen2": _rotary_family,
    "qwen3": _rotary_family,
    "gemma2": _rotary_family,
    "gemma3_text": _rotary_family,
    "gpt2": _gpt2,
}
