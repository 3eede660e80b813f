"""What was measured once of a kind of worker (`tandem jobs plan --calibrate`), where it is kept, and what it says.

A kind is a CPU or GPU by name with the version of torch, a precision, threads for each worker, and how many workers
were measured at once on the machine: neighbours share its memory's bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.precision import Precision
from jobs import notes

FILE = "calibration.json"
"""In Tandem's home."""

Curve = Sequence[Sequence[float]]
"""Points (x, rate), rising in x."""


@dataclass(frozen=True)
class Rates:
    """One kind of worker. FLOPs are those of products; a pass is forward and backward."""

    kind: str
    precision: Precision
    threads: int
    workers: int
    process_bytes: int
    """Of a process that has imported what a worker needs."""
    engine_bytes: int
    """What it takes more with the smallest engine, when it has learned."""
    layers: Sequence[Sequence[float]]
    """(hidden size, tokens, FLOP/s) of passes through layers of a Llama, norms and all, with short rows."""
    products: Curve
    """(inner size, FLOP/s) of passes through a wide linear layer: the output head."""
    attention: Curve
    """(length of rows, FLOP/s) of passes through causal attention, both halves of its square counted."""
    logits_per_s: float
    """Elements of logits whose cross-entropy and gradient are computed."""
    updated_per_s: float
    """Elements that AdamW updates, with the gradient's norm and clipping."""
    bandwidth: float
    """Bytes read and written by copies, a second."""
    overhead_s: Sequence[float]
    """What an engine adds for each parameter and micro-batch, by ZeRO stage."""
    reduced_per_s: float | None = None
    """Bytes of a tensor that two ranks sum; None: they were not measured."""
    gathered_per_s: float | None = None
    """Bytes of a tensor that two ranks gather."""
    collective_s: float = 0.0
    """Of the smallest collective."""

    @property
    def said(self) -> str:
        """Say what was measured."""
        return f"rates measured on {self.kind}, {self.workers} × {self.threads} threads, {self.precision}"


def kept(folder: Path) -> list[Rates]:
    """Return what was measured on this machine.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / FILE
    names = {field.name for field in fields(Rates)}
    entries = notes.read(path).get("kinds", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} is damaged: remove it, and measure again with `tandem jobs plan --calibrate`")
    # what another version of Tandem has measured is measured anew
    return [Rates(**entry) for entry in entries if set(entry) == names]


def keep(folder: Path, found: Rates) -> Path:
    """Keep what was measured in place of what was before, and return the file."""
    others = [each for each in kept(folder) if _key(each) != _key(found)]
    folder.mkdir(parents=True, exist_ok=True)
    notes.write(folder / FILE, {"kinds": [asdict(each) for each in [*others, found]]})
    return folder / FILE


def _key(found: Rates) -> tuple[Any, ...]:
    return found.kind, found.precision, found.threads, found.workers


def choose(known: Sequence[Rates], kind: str, precision: Precision, threads: int, workers: int) -> Rates | None:
    """Return what was measured of this kind with as many workers at once, or the nearest number. Pure."""
    fitting = [each for each in known if (each.kind, each.precision, each.threads) == (kind, precision, threads)]
    return min(fitting, key=lambda each: (abs(each.workers - workers), each.workers), default=None)


def kind_of_cpu() -> str:
    """Name this machine's CPU and torch: what rates depend on."""
    import platform

    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{named or platform.machine()}, torch {torch.__version__}"


def kind_of_gpu() -> str:
    """Name this process's GPU and torch."""
    import torch

    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


def at(curve: Curve, x: float) -> float:
    """Return a curve's rate at x: on a line in log x between its points, that of the last one beyond."""
    points = [(math.log(point[0]), point[1]) for point in curve]
    position = math.log(x)
    if position <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if position <= right:
            return low + (high - low) * (position - left) / (right - left)
    return points[-1][1]


def of_layers(found: Rates, hidden: float, tokens: float) -> float:
    """Return the FLOP/s of passes through layers of a width with so many tokens at once."""
    widths = sorted({point[0] for point in found.layers})
    curve = [(width, at([point[1:] for point in found.layers if point[0] == width], tokens)) for width in widths]
    return at(curve, hidden)
