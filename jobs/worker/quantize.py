"""Phase `quantize`: int8 weight-only through torchao, with what it saved and what it cost."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.precision import Precision
from cluster.weights_cache import local
from jobs.data.prepare import Prepared
from jobs.spec import JobSpec
from jobs.tasks import Task
from jobs.worker.by_source import Sources, summarised
from jobs.worker.evaluate import During, Say, check_finite, unsaid, unwatched

SMALLER = 0.98
"""Of its parent's size a quantised model must have less than this share."""


@dataclass(frozen=True)
class Layers:
    """A model's linear layers by the last part of their names: q_proj → how many."""

    quantised: Counter[str]
    left: Counter[str]

    def as_dict(self) -> dict[str, Any]:
        """Return what the manifest keeps."""
        done, left = self.quantised.total(), self.left.total()
        return {"quantised": done, "of": done + left, "kinds": dict(self.quantised), "left": dict(self.left)}


def counted(kinds: Mapping[str, int]) -> str:
    """Say how many there are of each kind of layer."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def quantize(
    spec: JobSpec,
    parent: str,
    prepared: Prepared,
    precision: Precision,
    target: str,
    during: During = unwatched,
    say: Say = unsaid,
) -> dict[str, Any]:
    """Write the quantised model to `target` and return the comparison with its parent.

    Linear layers, gpt2's Conv1D among them, keep one scale per output row and int8 weights (symmetric, no calibration
    needed); embeddings and the head stay as they are, in the parent's own dtype. `precision` is what both are measured
    in, the quantised model as a server loads it: from its files.

    Returns:
        layers (what was quantised and what was not), bytes, parent_bytes, eval_<metric> and parent_eval_<metric> on
        the same held-out rows, loss_change (relative; none where the parent's loss is 0), and forward_ms,
        parent_forward_ms (one row).

    Raises:
        UserError: no layer was quantised, it saves nothing, or a loss is not finite. Then nothing is left at `target`.
    """
    from jobs import noise

    noise.quiet()
    import torch

    from jobs.data.prepare import rows_of
    from jobs.worker.export import DTYPES

    torch.set_num_threads(max(1, int(spec.resources.cpus_per_worker)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = prepared.task(spec)
    held_out = rows_of(prepared, prepared.eval_files)

    before = task.load_model(Path(parent), DTYPES[precision]).to(device)
    say([*task.said, *task.prepare_model(before, held_out.columns)])  # it holds for the quantised one too
    measured = _measure(spec, task, before, held_out, prepared.held_out(), device, during)
    check_finite(measured["eval_loss"], f"{parent} on the held-out rows")
    report: dict[str, Any] = {f"parent_{k}": v for k, v in measured.items()}
    directory = Path(target)
    partial, scratch = (directory.with_name(f".{directory.name}.{end}") for end in ("partial", "linear"))
    try:
        report["layers"] = _write(task, Path(parent), partial, scratch).as_dict()
        report["bytes"], report["parent_bytes"] = _weight_bytes(partial), _weight_bytes(Path(parent))
        _check_smaller(report["bytes"], report["parent_bytes"], parent)
        after = type(task).load(partial, task.options).load_model(partial, DTYPES[precision]).to(device)
        report |= _measure(spec, task, after, held_out, prepared.held_out(), device, during)
        check_finite(report["eval_loss"], f"{parent}, quantised, on the held-out rows")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if report["parent_eval_loss"]:  # of nothing there is no share
        report["loss_change"] = report["eval_loss"] / report["parent_eval_loss"] - 1
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return report


def _write(task: Task, parent: Path, directory: Path, scratch: Path) -> Layers:
    """Quantise the parent and write it, with what the task learned; say which layers were quantised."""
    import transformers
    from torchao.quantization import Int8WeightOnlyConfig

    from jobs.tasks import adapters, conv1d
    from jobs.worker.export import save

    for folder in (directory, scratch):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    whole, source = task.load_model(parent), parent
    _check_supported(whole, parent)
    if conv1d.layers(whole):
        conv1d.save(whole, scratch)
        source = scratch
    elif adapters.read(parent) is not None:
        save(whole, scratch)
        source = scratch
    settings = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    model = task.load_model(source, None, {"quantization_config": settings})
    found = layers_of(model)
    if not found.quantised:
        raise UserError(
            f"phase quantize changes no layer of {parent}: it has {counted(found.left) or 'no linear layer'}; only "
            "linear layers are quantised, not the head, embeddings or convolutions; serve the model as it is"
        )
    if hasattr(whole, "generation_config"):
        model.generation_config = whole.generation_config
    save(model, directory)
    task.save(directory)
    return found


def _check_supported(model: Any, parent: Path) -> None:
    """Refuse a model that transformers cannot load with quantised weights.

    Raises:
        UserError: it does not say what its inputs meet first, which transformers asks of what it quantises.
    """
    try:
        getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        raise UserError(
            f"phase quantize cannot do with {type(model).__name__} ({parent}): transformers quantises models with "
            "embeddings, of tokens or of patches; serve the model as it is"
        ) from None


def layers_of(model: Any) -> Layers:
    """Sort a model's linear layers by whether torchao has quantised them."""
    import torch
    from torchao.utils import TorchAOBaseTensor

    layers = Layers(Counter(), Counter())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            counter = layers.quantised if isinstance(module.weight, TorchAOBaseTensor) else layers.left
            counter[name.rpartition(".")[2]] += 1
    return layers


def _measure(
    spec: JobSpec, task: Task, model: Any, rows: Any, sources: Sources, device: Any, during: During
) -> dict[str, float]:
    import numpy as np
    import torch

    from jobs.worker.evaluate import measure, to_device

    limit, seed = spec.data.eval_max_rows, spec.data.split_seed
    how = {"device": device, "during": during, "sources": sources}
    sums = measure(task, model, rows, limit=limit, seed=seed, micro_batch=16, **how)
    measured = {f"eval_{key}": value for key, value in summarised(task, sums).items()}
    batch = to_device(task.collate(rows.take(np.zeros(1, dtype=np.int64))), device)
    with torch.inference_mode():
        durations = []
        for _ in range(5):
            began = time.perf_counter()
            task.loss(model, batch)
            durations.append(time.perf_counter() - began)
    return {**measured, "forward_ms": 1000 * sorted(durations)[2]}


def _check_smaller(size: float, before: float, parent: str) -> None:
    """Refuse what saves nothing: whoever registers it as int8 would believe otherwise.

    Raises:
        UserError: the linear layers that were found do not make up for their scales.
    """
    if not before or size < SMALLER * before:  # a hub id has no size here
        return
    raise UserError(
        f"phase quantize saves nothing on {parent}: {before:,.0f} bytes of weights would become {size:,.0f}. Only "
        "linear layers are quantised, not embeddings or convolutions; serve the model as it is"
    )


def _weight_bytes(directory: Path) -> float:
    """Return the bytes of a model's weights; adapters apart, with those of their base."""
    from jobs.tasks import adapters

    own = float(sum(path.stat().st_size for path in local(directory).glob("*.safetensors")))
    base = adapters.base_of(directory)
    return own + (_weight_bytes(base) if base is not None else 0.0)
