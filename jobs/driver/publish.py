"""What a finished phase leaves for others: the model contract beside the weights, and a version in the registry."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster import stored_weights, stores
from jobs import progress
from jobs.data.prepare import Prepared
from jobs.driver import card, mixing
from jobs.driver.job import Job
from jobs.tasks import Task, adapters
from jobs.tasks.own_code import code_digest
from tracking import manifest, outbox, registry
from tracking.errors import ServerUnreachable


def log_figures(job: Job, task: Task, sums: Mapping[str, Any]) -> None:
    """Have the pictures that the task draws of an evaluation kept with the run."""
    for name, content in task.figures(sums).items() if sums else ():
        job.track(lambda run, name=name, content=content: run.log_bytes(content, name))  # type: ignore[misc]


def publish(
    job: Job,
    prepared: Prepared,
    evaluation: dict[str, float],
    quantization: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write tandem.json beside the weights and register the version, if the spec asks for one.

    A server that is away costs the version a wait, not the job its success: it is registered with the run's end.
    """
    model = job.folder.model
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    register = job.spec.register_
    run_id = job.sender.run.run_id if job.sender.run else None
    contract = manifest.ModelManifest(
        name=job.part.model if job.part else register.model if register else job.spec.name,
        task=job.spec.task.name,
        architecture=config.get("model_type", "unknown"),
        run_id=run_id,
        parent=job.parent_uri,
        base=base_of(model, job.parent_uri),
        dataset=manifest.DatasetRef(name=prepared.name, digest=prepared.digest, parts=dict(prepared.parts)),
        spec_digest=job.spec.digest(),
        code=code_digest(job.spec.task.name),
        precision=job.precision,
        evaluation=evaluation,
        quantization=quantization,
        sweep=dict(job.part.origin) if job.part else None,
        remarks=job.folder.remarks(),
    )
    told = card.text(
        contract, prepared.task(job.spec), _facts(job, prepared, quantization is None and contract.base is None)
    )
    (model / card.FILE_NAME).write_text(told, encoding="utf-8")
    manifest.write(model, contract)
    job.track(lambda run: run.log_bytes(told.encode(), "model-card.md"))
    place = job.stored.put_model() if job.stored else str(model)
    made: dict[str, Any] = {"directory": stores.shown(place), "evaluation": evaluation, "model": stores.shown(place)}
    if (stored := stored_weights.read(model)) is not None:
        made["weights"] = stored.uri()
        files = "1 file" if len(stored.files) == 1 else f"{len(stored.files)} files"
        progress.say(f"its weights are in {stored.uri()}: {files}, {stored.bytes:,} bytes")
    if register is not None:
        try:
            version = registry.register(
                register.model, place if job.stored else model, run_id=run_id, alias=register.alias
            )
            made["model"] = version.uri
            progress.say(f"registered {version.uri}{f' as @{register.alias}' if register.alias else ''}")
        except ServerUnreachable as error:
            progress.say(f"{register.model} is not registered yet: {error}")
            outbox.postpone(job.folder.spool, outbox.Version(register.model, place, register.alias))
    return made


def base_of(model: Path, parent: str | None) -> manifest.BaseRef | None:
    """Return what a model's adapters belong to, where they were not merged.

    Args:
        parent: what the job started from, as others name it.
    """
    base = adapters.read(model)
    if base is None:
        return None
    return manifest.BaseRef(
        reference=parent if parent and parent.startswith("models:/") else base.at, digest=base.digest
    )


def _facts(job: Job, prepared: Prepared, whole: bool) -> card.Facts:
    """Return what the model's card tells beside the manifest; only a whole model's weights are counted."""
    files, stored = sorted(job.folder.model.glob("*.safetensors")), stored_weights.read(job.folder.model)
    elsewhere = list(stored.files.values()) if stored is not None else []
    training = job.spec.training
    return card.Facts(
        phase=job.spec.phase,
        parameters=sum(map(_elements, files)) + sum(file.elements for file in elsewhere) if whole else None,
        size=sum(file.stat().st_size for file in files) + sum(file.bytes for file in elsewhere),
        train_rows=prepared.train_rows,
        eval_rows=prepared.eval_rows,
        notes=[*prepared.notes, *mixing.said(job.spec, prepared, job.steps)],
        bad_rows=prepared.bad_rows,
        first_bad=prepared.first_bad,
        training=training.model_dump(mode="json") if training else None,
    )


def _elements(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(str(file), framework="numpy") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
