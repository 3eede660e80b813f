"""What a plan has to know of a model, read off a model that is built without memory: its parameters and its shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from cluster.errors import UserError
from jobs.worker import held, optimizers
from jobs.worker.zero import PERSISTENT, SUMMED_ALONE

HEAP = 32 << 20
"""Bytes from which glibc gives memory back as soon as it is freed (DEFAULT_MMAP_THRESHOLD_MAX); smaller pieces stay."""


@dataclass(frozen=True)
class Decoder:
    """The shape of a causal transformer; widths are numbers of elements for each token."""

    layers: int
    hidden: int
    queries: int
    """All heads together, which is not always `hidden`."""
    keys: int
    """All key heads together; as many again are values."""
    intermediate: int
    """Of the MLP."""
    gated: bool
    """The MLP multiplies two projections (Shazeer 2020, arXiv:2002.05202)."""
    rms_norm: bool
    """Its norms are RMSNorm as transformers computes it, in fp32."""
    vocabulary: int
    stepped: bool = False
    """Its GELU is computed in steps, as gpt2's is, each of which keeps something."""
    mixture: bool = False
    """A token sees some experts only."""


@dataclass(frozen=True)
class Facts:
    """A model in numbers. Elements are counted once where layers share them."""

    kind: str
    """Its class."""
    parameters: int
    trainable: int
    embedding: int
    """Elements of tables that are looked up only; one that is also the output head is not among them."""
    vectors: int
    """Elements of biases and norms."""
    largest: int
    """Elements of the largest parameter."""
    decoder: Decoder | None = None
    """None: no causal transformer, of which only the parameters are known."""
    small: int = 0
    """Trained elements of parameters whose fp32 gradient is smaller than HEAP."""
    joined: int = 0
    """Trained elements of parameters whose gradients are copied behind each other where they are summed one by one."""
    tensors: int = 0
    """How many parameters."""
    persistent: int = 0
    """Elements of parameters so small that they stay in memory where others are in files."""
    matrices: int = 0
    """Elements of the trained matrices that Muon is made for."""
    held: int = 0
    """Elements of frozen weights that are held in few bits; they are among `parameters`."""
    held_bytes: int = 0
    """What these are held in."""
    held_largest: int = 0
    """Elements of the largest of them, which is made whole for as long as it multiplies."""

    @property
    def frozen(self) -> int:
        """Elements that are not trained."""
        return self.parameters - self.trainable

    @property
    def numbers(self) -> int:
        """Elements that are there as numbers, whose width the setting decides."""
        return self.parameters - self.held


def of(model: torch.nn.Module, base: Literal["whole"] | held.Kind = "whole") -> Facts:
    """Count a model's parameters; it may be on the meta device, and have adapters.

    Args:
        base: how its frozen linear layers will be held, where they are whole yet.

    Raises:
        UserError: it has none, and they are to be held in few bits.
    """
    few = list(_in_few_bits(model)) if base == "whole" else list(_to_be_held(model, base))
    gone = {id(module.weight) for _, _, module in few if not isinstance(module, held.Held)}
    parameters = [each for each in model.parameters() if id(each) not in gone]
    elements = [count for count, _, _ in few]
    looked_up = {id(each.weight): each.weight for each in model.modules() if isinstance(each, torch.nn.Embedding)}
    others = [module for module in model.modules() if not isinstance(module, torch.nn.Embedding)]
    shared = {id(own) for module in others for own in module.parameters(recurse=False)}
    plain = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    return Facts(
        kind=type(plain).__name__,
        parameters=sum(each.numel() for each in parameters) + sum(elements),
        trainable=sum(each.numel() for each in parameters if each.requires_grad),
        embedding=sum(weight.numel() for at, weight in looked_up.items() if at not in shared),
        vectors=sum(each.numel() for each in parameters if each.dim() < 2),
        largest=max((each.numel() for each in parameters), default=0),
        small=sum(each.numel() for each in parameters if each.requires_grad and 4 * each.numel() < HEAP),
        joined=sum(each.numel() for each in parameters if each.requires_grad and each.numel() < SUMMED_ALONE),
        tensors=len(parameters),
        persistent=sum(each.numel() for each in parameters if each.numel() <= PERSISTENT),
        decoder=_decoder(plain),
        matrices=_matrices(model),
        held=sum(elements),
        held_bytes=sum(size for _, size, _ in few),
        held_largest=max(elements, default=0),
    )


def _matrices(model: torch.nn.Module) -> int:
    """Count the elements that Muon would train; 0 where a model has no such matrices."""
    try:
        names = optimizers.matrices_of(model)
    except UserError:
        return 0
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in names)


def _in_few_bits(model: torch.nn.Module) -> Iterator[tuple[int, int, torch.nn.Module]]:
    """Yield the layers that are held in few bits: (elements, bytes, the layer)."""
    for module in model.modules():
        if isinstance(module, held.Held):
            yield module.out_features * module.in_features, module.bits.nbytes + module.scale.nbytes, module


def _to_be_held(model: torch.nn.Module, kind: held.Kind) -> Iterator[tuple[int, int, Any]]:
    """Yield the layers that will be, the same way."""
    for _, module in held.layers(model, kind):
        first, second = module.weight.shape
        rows, columns = (first, second) if isinstance(module, torch.nn.Linear) else (second, first)
        yield module.weight.numel(), held.size(rows, columns, kind), module


def _decoder(model: torch.nn.Module) -> Decoder | None:
    """Read the shape of a causal transformer off its config; None of what has no attention heads or does not write."""
    config: Any = getattr(model, "config", None)
    if config is None or not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return None
    layers, hidden = _entry(config, "num_hidden_layers"), _entry(config, "hidden_size")
    heads, vocabulary = _entry(config, "num_attention_heads"), _entry(config, "vocab_size")
    if not (layers and hidden and heads and vocabulary):
        return None
    head = _entry(config, "head_dim") or hidden // heads
    between = next(
        filter(None, (_entry(config, name) for name in ("intermediate_size", "n_inner", "ffn_dim"))), 4 * hidden
    )
    names = [name.rpartition(".")[2] for name, _ in model.named_modules()]
    return Decoder(
        layers=layers,
        hidden=hidden,
        queries=heads * head,
        keys=(_entry(config, "num_key_value_heads") or heads) * head,
        intermediate=between,
        gated="gate_proj" in names or "gate_up_proj" in names,
        rms_norm=any(type(module).__name__.endswith("RMSNorm") for module in model.modules()),
        vocabulary=vocabulary,
        stepped=any(type(module).__name__ == "NewGELUActivation" for module in model.modules()),
        mixture=any(_entry(config, name) for name in ("num_local_experts", "num_experts", "n_routed_experts")),
    )


def _entry(config: Any, name: str) -> int:
    """Return a whole number of a config, 0 where it has none."""
    try:
        found = getattr(config, name, None)
    except Exception:  # there is one for each layer, and no single value
        return 0
    return found if isinstance(found, int) else 0
