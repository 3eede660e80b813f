"""Measure a model on held-out rows. Sums add up, so ranks and tasks measure shares of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from cluster.errors import UserError
from cluster.precision import Precision
from jobs.data.prepare import Prepared
from jobs.data.rows import Rows
from jobs.spec import JobSpec
from jobs.tasks import Batch, Task
from jobs.worker import by_source
from jobs.worker.by_source import Sources

NONE: Sources = MappingProxyType({})
"""Rows that are of no source of a mixture."""


class NotFinite(UserError):
    """A model's loss is NaN or infinite: whatever else was measured of it means nothing."""

    exit_code = 1


def check_finite(loss: float, of: str) -> None:
    """Refuse what cannot be compared with anything.

    Args:
        of: the model, and the rows that it was measured on.

    Raises:
        NotFinite: the loss is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise NotFinite(
            f"the loss of {of} is {loss}: the model makes NaN or infinite numbers of them, so that nothing measured of "
            "it means anything. No model comes of this run"
        )


def check_rated(metrics: Mapping[str, float], metric: str, keep_best: int) -> None:
    """Refuse to keep the best checkpoints by what is not measured of this data: none would be kept as one.

    Args:
        metrics: of an evaluation.
        metric, keep_best: the spec's, of `checkpoint`.

    Raises:
        UserError: it is not among them.
    """
    if keep_best and metric not in metrics:
        raise UserError(
            f"checkpoint.metric {metric!r} is not measured of this data, so that no checkpoint could be the best; "
            f"measured: {', '.join(metrics)}"
        )


During = Callable[[str], AbstractContextManager[None]]
"""What has a limit of its own meanwhile (jobs/worker/watchdog.py)."""
Say = Callable[[Sequence[str]], None]
"""Takes sentences for the job's log and its run."""


Part = Callable[[Batch], Batch]
"""Takes a micro-batch; returns what of it is this rank's."""


def whole(batch: Batch) -> Batch:
    """Return a micro-batch, with tensors of any shape, as it is: no other rank shares its rows."""
    return batch


def unsaid(sentences: Sequence[str]) -> None:
    """Keep to oneself what the model has to be said of."""


def unwatched(what: str) -> AbstractContextManager[None]:
    """Set no limit."""
    return nullcontext()


def measure(
    task: Task,
    model: torch.nn.Module,
    rows: Rows,
    *,
    limit: int | None,
    seed: int,
    micro_batch: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    during: During = unwatched,
    part: Part = whole,
    sources: Sources = NONE,
) -> dict[str, Any]:
    """Return the task's sums over this rank's share (every W-th) of `limit` rows drawn by `seed` (all for None).

    What the task has gathered instead is an array (n, …) of this rank's rows; `joined` puts the ranks' together.
    Of `sources` the loss and its terms are added up for each, too (jobs/worker/by_source.py).

    Each rank makes the same number of forward passes (ZeRO-3 gathers weights in each), the last ones with no weight.
    """
    measured = sample(len(rows), limit, seed)
    totals: dict[str, torch.Tensor] = {}
    kept: dict[str, list[np.ndarray]] = {}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for source, chosen in by_source.passes(measured, sources, rank, world_size, micro_batch):
            taken = rows.take(chosen if len(chosen) else np.zeros(1, dtype=np.int64))
            with during("pass"):
                for key, value in task.measure(model, to_device(part(task.collate(taken)), device)).items():
                    if key in task.gathered:
                        kept.setdefault(key, []).append(_array(value)[: len(chosen)])
                        continue
                    added = value.detach().double().cpu()
                    of_source = [by_source.sum_of(source, key)] if source and key in ("loss", task.loss_terms) else []
                    for name in (key, *of_source):
                        totals[name] = totals.get(name, torch.zeros_like(added)) + (added if len(chosen) else 0)
    model.train(was_training)
    return {**flat(totals), **{key: np.concatenate(parts) for key, parts in kept.items()}}


def _array(value: torch.Tensor) -> np.ndarray:
    """Return a tensor as numpy has it: bf16 becomes fp32."""
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add the sums of W shares up; what was gathered is put together in the order of the rows.

    Args:
        parts: what `measure` returns for rank 0, 1, …, W - 1.
    """
    whole = {key: value for key, value in parts[0].items() if not isinstance(value, np.ndarray)}
    whole |= {key: sum(part.get(key, 0.0) for part in parts) for key in whole}
    names = dict.fromkeys(key for part in parts for key, value in part.items() if isinstance(value, np.ndarray))
    return {**whole, **{key: interleaved([part[key] for part in parts if key in part]) for key in names}}


def interleaved(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Put W shares (n, …), of which each holds every W-th row, together (N, …)."""
    whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def sample(count: int, limit: int | None, seed: int) -> np.ndarray:
    """Return which of `count` rows are measured, int64 (N,), in order: `limit` of them drawn by the seed, or all.

    The same for whoever measures: training, evaluation and quantisation compare on the same rows.
    """
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.Generator(np.random.PCG64(seed)).choice(count, limit, replace=False))


def flat(sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return sums as numbers: a scalar () under its name, the elements of an array (…) as `name.0`, `name.1`, …."""
    named: dict[str, float] = {}
    for key, value in sums.items():
        elements = enumerate(value.flatten().tolist())
        named |= {key: value.item()} if value.ndim == 0 else {f"{key}.{index}": x for index, x in elements}
    return named


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Move a batch, tensors of any shape; a copy to an accelerator does not wait if it is of what `pinned` returns."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()} if device.type != "cpu" else batch


def pinned(batch: Batch, device: torch.device) -> Batch:
    """Return a batch, tensors of any shape, in memory that a GPU, if that is the device, can read by itself.

    Never run yet on a GPU: none was there.
    """
    return {key: value.pin_memory() for key, value in batch.items()} if device.type == "cuda" else batch


def evaluate_share(
    spec: JobSpec,
    directory: str,
    prepared: Prepared,
    precision: Precision,
    rank: int,
    world_size: int,
    during: During = unwatched,
    say: Say = unsaid,
) -> dict[str, Any]:
    """Load the model and return the sums over one share of the held-out rows: phase `evaluate`, as a Ray task."""
    from jobs import noise
    from jobs.data.prepare import rows_of
    from jobs.worker.export import DTYPES

    noise.quiet()
    torch.set_num_threads(max(1, int(spec.resources.cpus_per_worker)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = prepared.task(spec)
    model = task.load_model(Path(directory), DTYPES[precision]).to(device)
    rows = rows_of(prepared, prepared.eval_files)
    say([*task.said, *task.prepare_model(model, rows.columns)])
    return measure(
        task,
        model,
        rows,
        limit=spec.data.eval_max_rows,
        seed=spec.data.split_seed,
        micro_batch=16,
        device=device,
        rank=rank,
        world_size=world_size,
        during=during,
        sources=prepared.held_out(),
    )
