"""A small network's forward pass as one graph: where it computes for 0.1 ms, most of the time is Python's.

With cold caches, as a request finds them that comes 20 ms after the last one, it saves a third of a policy's
forward pass; again and again, half (benchmarks/frozen.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

Graph = Callable[..., torch.Tensor]
TRIED = (1, 2, 5)
"""Rows of the batches on which the graph must say what the network says."""
TOLERANCE = 1e-4


class Frozen(torch.nn.Module):
    """A network that answers by its graph."""

    def __init__(self, model: torch.nn.Module, graph: Graph, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self._graph, self._names = graph, names

    def forward(self, **batch: torch.Tensor) -> Any:
        """Return `logits` (B, …) of tensors (B, …); inputs of other names are the network's own."""
        if tuple(batch) != self._names:
            return self.model(**batch)
        return SimpleNamespace(logits=self._graph(*batch.values()))


def frozen(model: torch.nn.Module, example: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Return a network that answers by a graph of it; the network itself where its graph would not say the same.

    A graph has one way through the network, so this is for networks that take the same way for all inputs, and it is
    tried on random rows, in batches of several sizes.

    Args:
        model: in evaluation mode; its weights change no more, its forward takes the example's names and returns
            `logits`.
        example: tensors (B, …) of the kinds that will come, floating ones in the model's datatype.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return model
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", torch.jit.TracerWarning)  # a way that depends on what comes
            graph = _traced(model, example)
            same = all(_agree(model, graph, _drawn(example, rows)) for rows in TRIED)
    except Exception:  # whatever a network, a quantised tensor or the tracer raises: it only stays as fast as it was
        return model
    return Frozen(model, graph, tuple(example)).eval() if same else model


def _traced(model: torch.nn.Module, example: Mapping[str, torch.Tensor]) -> Graph:
    names = list(example)

    class Logits(torch.nn.Module):
        """The network with its inputs in order."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> Any:
            return self.model(**dict(zip(names, tensors, strict=True))).logits

    graph: Graph = torch.jit.freeze(torch.jit.trace(Logits().eval(), tuple(_drawn(example, 2).values())))
    for _ in range(3):  # it is optimised at its first runs
        graph(*_drawn(example, 1).values())
    return graph


def _agree(model: torch.nn.Module, graph: Graph, batch: dict[str, torch.Tensor]) -> bool:
    found, expected = graph(*batch.values()), model(**batch).logits
    return found.shape == expected.shape and torch.allclose(found, expected, TOLERANCE, TOLERANCE)


def _drawn(example: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """Return tensors of so many rows: numbers by chance, whole ones as in the example's first row."""
    generator = torch.Generator().manual_seed(rows)

    def of(tensor: torch.Tensor) -> torch.Tensor:
        shape = (rows, *tensor.shape[1:])
        if tensor.dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(tensor.dtype)
        return tensor[:1].expand(shape).clone()

    return {name: of(tensor) for name, tensor in example.items()}
