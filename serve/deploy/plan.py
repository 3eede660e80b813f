"""ServeSpec → what to deploy: every model's URI resolved to a directory, a version and its manifest."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from cluster.errors import UserError
from serve.spec import ModelServeSpec, ServeSpec


@dataclass(frozen=True)
class ServedModel:
    """One model, resolved: all that a replica needs to load it and the gateway to describe it."""

    name: str
    directory: str
    version: str
    """The registry's version; for a plain directory, a digest of its files."""
    run_id: str | None
    task: str
    generates: bool
    engine: Literal["torch", "vllm", "task"]
    options: dict[str, Any]
    """What the engine's constructor takes beside the below."""
    max_context: int | None
    max_batch: int
    threads: int
    created: int
    details: dict[str, Any] = field(default_factory=dict)
    """What /v1/models tells beside the above."""

    def digest(self) -> str:
        """Digest what a running replica cannot change: when it differs, replicas are replaced."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def absolute(spec: ServeSpec, folder: Path) -> ServeSpec:
    """Return the spec with model directories made absolute; relative ones lie beside the spec, in `folder`."""
    models = {
        name: model
        if model.model.startswith("models:/")
        else model.model_copy(update={"model": os.path.abspath(folder / Path(model.model).expanduser())})
        for name, model in spec.models.items()
    }
    return spec.model_copy(update={"models": models})


def resolve(spec: ServeSpec) -> list[ServedModel]:
    """Resolve every model of the spec where the cluster can see it.

    Raises TrackingError for an unknown name, alias or directory, UserError for an engine that does not fit the task.
    """
    return [_resolve(name, model) for name, model in spec.models.items()]


def _resolve(name: str, model: ModelServeSpec) -> ServedModel:
    from jobs import tasks
    from tracking import manifest as manifests
    from tracking import registry

    registered = registry.find_version(model.model) if model.model.startswith("models:/") else None
    directory = registry.resolve(registered.uri if registered else model.model)
    manifest = manifests.read(directory)
    version = str(registered.version) if registered else _content_digest(manifest.files)
    generates = tasks.get(manifest.task).generates
    engine = _engine(name, model, manifest.task, generates)
    return ServedModel(
        name=name,
        directory=str(directory),
        version=version,
        run_id=manifest.run_id,
        task=manifest.task,
        generates=generates,
        engine=engine,
        options=_options(name, model, engine),
        max_context=model.max_context,
        max_batch=model.max_batch,
        threads=max(1, int(model.resources.cpus_per_replica)),
        created=int(datetime.fromisoformat(manifest.created_at).timestamp()),
        details=_details(model.model, manifest),
    )


def _engine(name: str, model: ModelServeSpec, task: str, generates: bool) -> Literal["torch", "vllm", "task"]:
    if generates and model.engine == "vllm":
        return "vllm"
    fitting: Literal["torch", "task"] = "torch" if generates else "task"
    if model.engine not in ("auto", fitting):
        raise UserError(f"models.{name}.engine: {model.engine!r} cannot serve {task}; use {fitting!r} or leave it out")
    return fitting


def _options(name: str, model: ModelServeSpec, engine: str) -> dict[str, Any]:
    """Return what the engine is told. Raises UserError for a setting that it has not."""
    if engine != "torch" and model.precision in ("int8", "int4"):
        raise UserError(f"models.{name}.precision: {model.precision!r} is for the torch engine; leave it out")
    if engine != "torch" and model.runner != "auto":
        raise UserError(f"models.{name}.runner: {model.runner!r} is for the torch engine; leave it out")
    if engine == "task":
        return {"precision": model.precision}
    cache_memory_bytes = None if model.cache_gib is None else int(model.cache_gib * 2**30)
    options = {"precision": model.precision, "compile": model.compile, "cache_memory_bytes": cache_memory_bytes}
    return options if engine == "vllm" else {**options, "runner": model.runner}


def _content_digest(files: dict[str, Any]) -> str:
    digests = {path: file.sha256 for path, file in files.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:12]


def _details(uri: str, manifest: Any) -> dict[str, Any]:
    return {
        "uri": uri,
        "architecture": manifest.architecture,
        "run_id": manifest.run_id,
        "parent": manifest.parent,
        "dataset": manifest.dataset.model_dump() if manifest.dataset else None,
        "evaluation": manifest.evaluation,
        "quantization": manifest.quantization,
    }
