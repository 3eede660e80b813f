"""ServeSpec → what to deploy: every model's URI resolved to a directory, a version and its manifest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from cluster import shipping, store_uri, stored_weights, stores
from cluster.errors import UserError
from serve.deploy import own_code
from serve.deploy.own_code import OwnCode
from serve.engines import sampling_defaults, table
from serve.engines.table import EngineEntry
from serve.spec import ModelServeSpec, ServeSpec

if TYPE_CHECKING:
    from jobs.tasks import Task


BESIDE_ANSWERS = {"name", "max_batch", "threads", "created", "details"}
"""What may differ between replicas that give the same answers: how many at a time, how fast, and what is told of it."""


@dataclass(frozen=True)
class ServedModel:
    """One model, resolved: all that a replica needs to load it and the gateway to describe it."""

    name: str
    directory: str
    """As `tracking.model_store.here` takes it: each node fetches one that lies in a store."""
    version: str
    """The registry's version; for a plain directory, a digest of its files."""
    run_id: str | None
    task: str
    generates: bool
    engine: str
    """As serve.engines.table.get takes it; never `auto`."""
    options: dict[str, Any]
    """The engine's own options, whole: what the spec left out has its default."""
    precision: str
    max_context: int | None
    max_batch: int
    threads: int
    created: int
    code: str | None = None
    """Digest of the user's own code that its replicas import; None for what Tandem or the nodes have themselves."""
    details: dict[str, Any] = field(default_factory=dict)
    """What /v1/models tells beside the above."""

    def digest(self) -> str:
        """Digest what a running replica cannot change: when it differs, replicas are replaced."""
        return _digest(asdict(self))

    def build(self) -> str:
        """Digest what an answer depends on: only where it is the same may another replica go on with one."""
        return _digest({name: value for name, value in asdict(self).items() if name not in BESIDE_ANSWERS})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def absolute(spec: ServeSpec, folder: Path) -> ServeSpec:
    """Return the spec with its directories and files made absolute; relative ones lie beside it, in `folder`."""
    models = {
        name: model
        if model.model.startswith("models:/") or store_uri.is_store(model.model)
        else model.model_copy(update={"model": os.path.abspath(folder / Path(model.model).expanduser())})
        for name, model in spec.models.items()
    }
    http = spec.http
    if http.tls is not None:
        files = {key: os.path.abspath(folder / Path(path).expanduser()) for key, path in http.tls.model_dump().items()}
        http = http.model_copy(update={"tls": http.tls.model_copy(update=files)})
    return spec.model_copy(update={"models": models, "http": http})


def resolve(spec: ServeSpec, code: OwnCode | None = None) -> list[ServedModel]:
    """Resolve every model of the spec where the cluster can see it; `code` is what was sent from beside the spec.

    Raises TrackingError for an unknown name, alias or directory, UserError for an engine that does not fit the task or
    has not the options that the spec gives, CodeWanted where a model needs code and none was sent.
    """
    return [_resolve(name, model, code) for name, model in spec.models.items()]


def _resolve(name: str, model: ModelServeSpec, code: OwnCode | None) -> ServedModel:
    from tracking import manifest as manifests
    from tracking import model_folder, model_store, registry

    if store_uri.is_store(model.model):
        store_uri.checked(model.model, f"models.{name}")
    registered = registry.find_version(model.model) if model.model.startswith("models:/") else None
    directory = registry.resolve(registered.uri if registered else model.model)
    model_folder.check(directory, f"models.{name}")
    manifest = manifests.read(directory)
    stored_weights.look(directory, f"models.{name}")
    version = str(registered.version) if registered else _content_digest(manifest.files)
    task, config = _task(name, manifest.task, code), _config(Path(directory))
    generates = task.generates
    check_context(name, model.max_context, generates, config)
    engine_name, engine = _engine(name, model, manifest.task, generates, code)
    if manifest.base is not None and not engine.adapters:
        raise UserError(
            f"models.{name}.engine: {engine_name} serves whole models, and {model.model} holds adapters for "
            f"{manifest.base.reference}: leave engine out, or train again with model.lora.merge: true"
        )
    sent = code is not None and any(_is_sent(part, code) for part in (manifest.task, engine_name))
    return ServedModel(
        name=name,
        directory=model_store.portable(directory),
        version=version,
        run_id=manifest.run_id,
        task=manifest.task,
        generates=generates,
        engine=engine_name,
        options=_options(name, model, engine),
        precision=model.precision,
        max_context=model.max_context,
        max_batch=model.max_batch,
        threads=max(1, int(model.resources.cpus_per_replica)),
        created=int(datetime.fromisoformat(manifest.created_at).timestamp()),
        code=shipping.digest(code.packed) if code is not None and sent else None,
        details=_details(model.model, manifest)
        | _embeddings(engine, model, task.embeds(config))
        | ({"infers": True} if engine.infers else {})
        | ({"transcribes": True} if getattr(task, "transcribes", False) else {})
        | _warning(manifest, sampling_defaults.left_out(Path(directory)) if generates else None),
    )


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads it says why
        return {}
    return config if isinstance(config, dict) else {}


def check_context(name: str, wanted: int | None, generates: bool, config: Mapping[str, Any]) -> None:
    """Refuse a `max_context` that the model cannot have.

    Args:
        config: the model's config.json.

    Raises:
        UserError: it is above the model's positions, or the model generates nothing.
    """
    if wanted is None:
        return
    if not generates:
        raise UserError(f"models.{name}.max_context: the model generates no text, so it has no effect: leave it out")
    text = config.get("text_config")
    own = (text if isinstance(text, Mapping) else config).get("max_position_embeddings")
    if isinstance(own, int) and wanted > own:
        raise UserError(f"models.{name}.max_context: {wanted} is above the {own} positions of the model")


def _is_sent(name: str, code: OwnCode) -> bool:
    return table.is_own(name) and code.holds(name)


def _task(name: str, task: str, code: OwnCode | None) -> type[Task]:
    from jobs import tasks

    if table.is_own(task):
        return own_code.load(f"models.{name}: its task", task, tasks.get, code)
    return tasks.get(task)


def _engine(
    name: str, model: ModelServeSpec, task: str, generates: bool, code: OwnCode | None
) -> tuple[str, EngineEntry]:
    """Return the engine's name, as the table knows it, and its entry."""
    wanted, place = table.kind(generates), f"models.{name}.engine:"
    fitting = table.choose(wanted, task=task)
    if model.engine.name == table.AUTO:
        return fitting.name, fitting
    own = table.is_own(model.engine.name)
    engine = own_code.load(place, model.engine.name, table.get, code) if own else table.get(model.engine.name)
    if wanted not in engine.serves:
        raise UserError(f"{place} {model.engine.name!r} cannot serve {task}; use {fitting.name!r} or leave it out")
    return model.engine.name, engine


def _options(name: str, model: ModelServeSpec, engine: EngineEntry) -> dict[str, Any]:
    """Return all options of the engine. Raises UserError for what it has not: `auto` is settled only here."""
    wrong = [f"models.{name}.{'.'.join(map(str, each.place))}: {each.message}" for each in model.wrong_for(engine)]
    if wrong:
        raise UserError("\n".join(wrong))
    return engine.options.model_validate(model.engine_options).model_dump(mode="json")


def _content_digest(files: dict[str, Any]) -> str:
    digests = {path: file.sha256 for path, file in files.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:12]


def _embeddings(engine: EngineEntry, model: ModelServeSpec, embeds: bool) -> dict[str, Any]:
    """Return what /v1/models tells of a text model's embeddings: None where its engine makes none.

    Args:
        embeds: whether the task makes vectors itself, in the engine `task`.
    """
    options = engine.options.model_validate(model.engine_options)
    pooling = getattr(options, "pooling", "mean" if embeds and engine.name == "task" else None)
    return {"embeddings": {"pooling": pooling, "normalized": True} if pooling else None}


def _warning(manifest: Any, left_out: str | None) -> dict[str, str]:
    """Return what /v1/models, `serve up` and `serve status` warn of.

    That is: own code that is not the trained model's, and what a generation config asks for in vain.
    """
    from jobs.tasks import own_code as own_tasks

    said = (own_tasks.difference(manifest.task, manifest.code), left_out)
    return {"warning": "; ".join(filter(None, said))} if any(said) else {}


def _details(uri: str, manifest: Any) -> dict[str, Any]:
    return {
        "uri": _told(uri),
        "architecture": manifest.architecture,
        "run_id": manifest.run_id,
        "parent": _told(manifest.parent),
        **({"base": _told(manifest.base.reference)} if manifest.base else {}),
        "dataset": manifest.dataset.model_dump() if manifest.dataset else None,
        "evaluation": manifest.evaluation,
        "quantization": manifest.quantization,
    }


def _told(uri: str | None) -> str | None:
    """Return what clients are told of where a model lies: not the folders of the cluster's nodes, nor its stores."""
    if not uri:
        return uri
    elsewhere = os.path.isabs(uri) or store_uri.is_store(uri)
    return PurePath(stores.shown(uri.partition("#")[0])).name if elsewhere else uri
