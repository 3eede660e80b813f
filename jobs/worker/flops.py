"""Model FLOPs: what forward and backward passes of a step's rows come to, and the share of the devices' peak (MFU).

Counted from the operations themselves, once or twice for each shape of a micro-batch, as torch's FlopCounterMode does:
two for each multiplication and addition of matrix products, convolutions and attention, nothing for the rest. It makes
6 N + 12 L H Q T a token of a decoder (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B: N weights in products,
L layers, H heads of size Q, T tokens); attention counts whole, be it causal, within documents, or not. Unlike torch's:

- What is computed a second time to save memory does not count: layers under gradient checkpointing, and the scores
  within the backward pass of fused attention.
- torch (2.13) does not know fused attention on CPUs, products grouped by expert, nor oneDNN's recurrent layers; they
  count here.
- Where an operation that multiplies is not known, or the count depends on more than shapes, nothing is told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from cluster.precision import Precision
from jobs.plan import devices
from jobs.tasks import Batch, document_attention, packed_attention
from jobs.tasks.torch_internals import EFFICIENT_OF_LENGTHS, EFFICIENT_OF_LENGTHS_BACKWARD
from jobs.worker.torch_internals import GROUPED_PRODUCT, TorchDispatchMode

MOST_SHAPES = 32
"""So many shapes of micro-batches are counted; a step with others is told no FLOPs."""
ENOUGH = 2
"""So often a shape is counted, with other rows each time: if the counts agree, they hold for all rows."""

aten = torch.ops.aten
Formula = Callable[..., int]


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    """Count the two products of attention: query and value (B, H, S, D), key (B, H, T, D)."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(_: torch.Tensor, *qkv: Any, **__: Any) -> int:
    """Count four products; the fifth makes the scores (B, H, S, T) again."""
    return 2 * _attention(*qkv)


def _lengths(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any, **__: Any) -> int:
    """Count attention of rows of documents, one after another, (T, H, D), as that of whole rows of `longest` tokens."""
    _, _, longest, *_ = others
    return 2 * query.shape[:-1].numel() * int(longest) * (query.shape[-1] + value.shape[-1])


def _lengths_backward(_: torch.Tensor, *given: Any, **__: Any) -> int:
    """Count four products, as above; what came forward, (T, H, D), and the sums of its weights come between."""
    query, key, value, _made, _sums, *others = given
    return 2 * _lengths(query, key, value, *others)


def _efficient_lengths(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any, **__: Any) -> int:
    """Count attention of rows of documents, one after another, (1, T, H, D), as whole rows of `longest` tokens."""
    _bias, _begins, _begins_of_keys, longest, *_ = others
    return 2 * query.shape[:-1].numel() * int(longest) * (query.shape[-1] + value.shape[-1])


def _efficient_lengths_backward(_: torch.Tensor, *given: Any, **__: Any) -> int:
    """Count four products, as above; what came forward, (1, T, H, D), comes between."""
    query, key, value, bias, _made, *others = given
    return 2 * _efficient_lengths(query, key, value, bias, *others)


def _grouped(left: torch.Tensor, right: torch.Tensor, *_: Any, **__: Any) -> int:
    """Count the products of experts: (T, I) by (E, I, O), (E, M, I) by (I, T), or (I, T) by (T, O).

    Each of the T rows goes to one of the E experts.
    """
    of_each = left.shape[-2:].numel() if right.dim() == 2 else left.numel()
    return 2 * of_each * right.shape[-1]


def _recurrent(rows: torch.Tensor, of_input: torch.Tensor, of_state: torch.Tensor, *_: Any, **__: Any) -> int:
    """Count a layer's products: rows (T, B, I), weights (G, I) and (G, H) for G gates' numbers."""
    return 2 * rows.shape[:-1].numel() * (of_input.numel() + of_state.numel())


def _recurrent_backward(*arguments: Any, **__: Any) -> int:
    """Count the products that make the gradients of rows (T, B, I) and weights (G, I), (G, H)."""
    return 2 * _recurrent(*arguments)


_PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward)
_KINDS_OF_ATTENTION = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
FORMULAS: dict[Any, Formula] = {
    **{operation: flop_registry[operation] for operation in _PRODUCTS},
    **{getattr(aten, f"_scaled_dot_product_{kind}"): _attention for kind in _KINDS_OF_ATTENTION},
    **{getattr(aten, f"_scaled_dot_product_{kind}_backward"): _attention_backward for kind in _KINDS_OF_ATTENTION},
    EFFICIENT_OF_LENGTHS: _efficient_lengths,
    EFFICIENT_OF_LENGTHS_BACKWARD: _efficient_lengths_backward,
    document_attention.ON_CPU: _attention,
    document_attention.ON_CPU_BACKWARD: _attention_backward,
    GROUPED_PRODUCT: _grouped,
    aten.mkldnn_rnn_layer: _recurrent,
    aten.mkldnn_rnn_layer_backward: _recurrent_backward,
}
BY_NAME: dict[str, Formula] = {
    "torch_attn._varlen_attn": _lengths,
    "torch_attn._varlen_attn_backward": _lengths_backward,
}
"""Of operations that are there once torch.nn.attention.varlen is imported, which takes a second."""
_MULTIPLIES = re.compile(r"(^|_)(rnn|mv|addmv|\w*mm|\w*matmul|linear|\w*conv\w*|attention|cdist|trilinear)(_|$)")
_KNOWN_NAMESPACES = frozenset({"aten", "prim", "prims", "profiler", "c10d", "_c10d_functional"})


def peak(device: torch.device, precision: Precision) -> float:
    """Return the dense FLOPs a second that a device can do, NaN where that is not known: on CPUs, and in fp32."""
    if device.type != "cuda" or precision != "bf16":
        return math.nan
    known = devices.of_cuda(torch.cuda.get_device_name(device))
    return math.nan if known is None or known.flops is None else known.flops[precision]


class FlopCounter(TorchDispatchMode):
    """Counts what is computed within it; what is computed stays the same, bit for bit."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.unknown: set[str] = set()
        """Operations that may multiply, and are not counted."""
        self.backward = False
        """Whether the backward pass runs: what needs gradients in it is computed a second time."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not (self.backward and torch.is_grad_enabled()):
            self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = getattr(func, "overloadpacket", None)
        formula = FORMULAS.get(name) or BY_NAME.get(str(name))
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        elif name is None or func.namespace not in _KNOWN_NAMESPACES or _MULTIPLIES.search(name.__name__):
            self.unknown.add(str(func))


class ModelFlops:
    """Those of one rank's micro-batches, by the shapes of their tensors."""

    def __init__(self) -> None:
        self.unknown: set[str] = set()
        """Operations for whose sake nothing is told."""
        self._counts: dict[Any, list[int]] = {}
        self._counter: FlopCounter | None = None
        self._shapes: Any = None
        self._step = 0.0

    @property
    def counting(self) -> bool:
        """Whether the micro-batch at hand is counted."""
        return self._counter is not None

    @contextmanager
    def forward(self, batch: Batch | None) -> Iterator[None]:
        """Count a micro-batch's forward pass if its shapes are new; None: its rows are no part of the step."""
        self._counter = None
        if batch is not None:
            named = (item for item in sorted(batch.items()) if item[0] != packed_attention.ENDS)  # counts do not use it
            self._shapes = tuple((name, tuple(tensor.shape)) for name, tensor in named)
            counts = self._counts.get(self._shapes, [])
            if self.unknown or (not counts and len(self._counts) >= MOST_SHAPES):
                self._step = math.nan
            elif len(counts) < ENOUGH:
                self._counter = FlopCounter()
            else:
                self._step += agreed(counts)
        with self._counter or nullcontext():
            yield

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Count the backward pass behind a forward pass that was counted."""
        counter = self._counter
        if counter is None:
            yield
            return
        counter.backward = True
        with counter:
            yield
        self._counts.setdefault(self._shapes, []).append(counter.flops)
        self.unknown |= counter.unknown
        self._step += math.nan if self.unknown else counter.flops

    def end_step(self) -> float:
        """Return the FLOPs of this rank's step, NaN where they are not known; another step begins."""
        flops, self._step = self._step, 0.0
        return flops


def agreed(counts: list[int]) -> float:
    """Return what all counts say, NaN where they differ. Pure."""
    return float(counts[0]) if len(set(counts)) == 1 else math.nan
