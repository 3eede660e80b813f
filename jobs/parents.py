"""What a job starts from, a model or an architecture: found, or refused before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cluster import store_uri, stored_weights, stores
from cluster.errors import UserError
from jobs import hub_folder
from jobs.spec import JobSpec
from jobs.tasks import Task, get, tokenization
from jobs.tasks.shared_rows import SharesRows
from tracking import model_folder, registry
from tracking.address import known_uri
from tracking.errors import ServerUnreachable, TrackingError

FULL_PRECISION = ("finetune", "pretrain", "quantize", "sweep")
"""Phases that cannot start from quantised weights."""


def find(spec: JobSpec, base: Path) -> Path | str | None:
    """Return the directory behind `model.from`, or the hub id; None for a model with fresh weights.

    A model in a store is fetched to this node, but for its weights; `model_store.portable` says of the directory what
    other nodes know it by.

    Args:
        base: where relative paths start.

    Raises:
        UserError: there is no such model, or it cannot do: see `check_folder`; or the tokenizer that the spec names
            needs code of its own.
    """
    source = spec.model.source
    check_tokenizer(spec, base, hub_folder.fetched)
    if source is None:
        check_architecture(spec, base)
        return None
    if source.startswith("models:/"):
        version = registry.find_version(source)
        check_version(spec, source, version)
        found = registry.resolve(version.uri)
    elif store_uri.is_store(source) or _is_path(source, base):
        found = registry.resolve(registry.located(source, base))
    else:
        check_hub_model(spec, source, base)
        return source
    check_folder(spec, source, found, base)
    stored_weights.look(found, f"model.from: {stores.shown(source)}")
    return found


def preflight(
    spec: JobSpec,
    base: Path,
    tracking: str | None = None,
    also: Callable[[JobSpec, Path, Path], None] | None = None,
    unchecked: Callable[[str], None] = lambda sentence: None,
) -> str | None:
    """Refuse what is known about `model.from` without a cluster; return what is missing, in a sentence.

    A folder is looked at where it is on this machine, a version where the registry answers. What is not there yet may
    come before the job does, so that is for the caller to judge.

    Args:
        base: where relative paths start.
        tracking: address of the registry, if not that of the environment.
        also: a further check, called with the spec, `base` and the folder where that is on this machine.
        unchecked: is told, in a sentence, what cannot be looked at from here.

    Raises:
        UserError: as `find`, and for a `models:/` URI that is none.
    """
    source = spec.model.source
    check_tokenizer(spec, base, hub_folder.cached)
    if source is None:
        return None
    if source.startswith("models:/"):
        missing, folder = _registered(spec, source, tracking, unchecked)
    elif store_uri.is_store(source):
        shown = stores.shown(store_uri.checked(source, "model.from"))
        unchecked(f"model.from: {shown} lies in a store, which is not asked from here, so its files were not looked at")
        return None
    elif _is_path(source, base):
        missing, folder = None, _path(source, base)
        if not folder.is_dir():
            return f"model.from: no model directory at {folder} on this machine"
    else:
        missing, folder = None, hub_folder.cached(source)
        if folder is None:
            unchecked(
                f"model.from: {source} is not in this machine's cache of the hub, so its files were not looked at"
            )
    if folder is None:
        return missing
    check_folder(spec, source, folder, base, whole=_is_path(source, base) or source.startswith("models:/"))
    if also is not None:
        also(spec, base, folder)
    return None


def _registered(
    spec: JobSpec, source: str, tracking: str | None, unchecked: Callable[[str], None]
) -> tuple[str | None, Path | None]:
    """Ask the registry for a version; return what is missing, and its folder where that is on this machine."""
    registry.parse(source)
    address = tracking or known_uri()
    left = f"so whether {source} exists, is quantised or fits model.config was not checked"
    if address is None:
        unchecked(f"model.from: no registry is known here (MLFLOW_TRACKING_URI, or a running cluster), {left}")
        return None, None
    try:
        version = registry.find_version(source, address)
    except ServerUnreachable:
        unchecked(f"model.from: the registry at {address} does not answer, {left}")
        return None, None
    except TrackingError as error:
        return f"model.from: {error}", None
    check_version(spec, source, version, address)
    if version.source.startswith("dir:") and version.directory.is_dir():
        return None, version.directory
    unchecked(f"model.from: the files of {source} are not on this machine, so they were not looked at")
    return None, None


def check_architecture(spec: JobSpec, base: Path) -> None:
    """Refuse an architecture, or an entry of its config, that the task cannot build; imports transformers.

    Args:
        base: where a task of the user's own lies.

    Raises:
        TaskError: it is unknown.
    """
    if spec.model.architecture is not None:
        task = get(spec.task.name, base)(spec.task.options)
        task.check_model(spec.model.architecture, spec.model.config)
        _check_shared(spec, task, spec.model.architecture)


def _check_shared(spec: JobSpec, task: Task, origin: Path | str) -> None:
    """Refuse a model of whose rows workers cannot have a part each, where the spec wants that."""
    if spec.training is not None and spec.training.parallel.sequence > 1:
        assert isinstance(task, SharesRows), "a spec of another task is refused"
        task.check_shared_by(spec.training.parallel.sequence, origin, spec.model.config)


def check_version(spec: JobSpec, source: str, version: registry.ModelVersion, tracking: str | None = None) -> None:
    """Refuse a quantised version for a phase that needs whole weights, and say which one would do.

    Raises:
        UserError: it is quantised.
    """
    if version.quantization is None or spec.phase not in FULL_PRECISION:
        return
    whole = next((other for other in registry.versions(version.name, tracking) if other.quantization is None), None)
    remedy = f"choose version {whole.version} ({whole.uri})" if whole else "no version of it is in full precision"
    raise UserError(
        f"model.from: {source} is version {version.version}, {version.quantization}, and phase {spec.phase} needs "
        f"weights in full precision: {remedy}"
    )


def check_folder(spec: JobSpec, source: str, folder: Path, base: Path, whole: bool = True) -> None:
    """Refuse a folder that the job could not load, or must not.

    Args:
        base: where a task of the user's own lies.
        whole: all files of the model should be there; False for a cache, which may hold some only.

    Raises:
        UserError: it needs code of its own, holds pickles or an adapter, is quantised where the phase needs whole
            weights, is damaged, of another kind than the task's, or lacks an entry of `model.config`.
    """
    what = f"model.from: {stores.shown(source)}"
    model_folder.check(folder, what)
    method = model_folder.quantisation(folder)
    if method is not None and spec.phase in FULL_PRECISION:
        raise UserError(
            f"{what} is quantised ({method}), and phase {spec.phase} needs weights in full precision: choose the "
            "model that it was made from"
        )
    if whole:
        model_folder.refuse(what, model_folder.damage(folder))
        described = ("config.json", "tandem.json", "adapter_config.json")
        if next(folder.glob("*.safetensors"), None) and not any((folder / name).is_file() for name in described):
            raise UserError(
                f"{what} holds weights, and no config.json that says of what model: name the model's own folder; of "
                "weights that `model.export` put elsewhere, that is `model/` in the folder of the run"
            )
    if (folder / "config.json").is_file():
        task = get(spec.task.name, base)(spec.task.options)
        task.check_parent(folder, spec.model.config)
        _check_shared(spec, task, folder)


def check_hub_model(spec: JobSpec, source: str, base: Path) -> None:
    """Refuse a model of the hub by its small files and the names of the others, before its weights are fetched.

    Raises:
        UserError: as `check_folder`.
    """
    fetched = hub_folder.fetched(source)
    if (folder := fetched or hub_folder.cached(source)) is not None:
        check_folder(spec, source, folder, base, whole=False)
    names = hub_folder.file_names(source) if fetched is not None else []  # else the hub does not answer
    model_folder.refuse(f"model.from: {source}", model_folder.pickled(Path(source), names))


def check_tokenizer(spec: JobSpec, base: Path, of_hub: Callable[[str], Path | None]) -> None:
    """Refuse a tokenizer of `task.tokenizer.from` that needs code of its own.

    Args:
        of_hub: returns the folder with the small files of a hub id, where they can be had.

    Raises:
        UserError: it does.
    """
    options = spec.task.options.get("tokenizer")
    source = options.get("from") if isinstance(options, dict) else None
    if source is None:
        return
    place = tokenization.located(source, base)
    folder = place if isinstance(place, Path) else of_hub(place)
    if folder is not None:
        model_folder.refuse(f"task.tokenizer.from: {source}", model_folder.own_code(folder))


def _is_path(source: str, base: Path) -> bool:
    return _path(source, base).exists() or source.startswith(("/", ".", "~"))


def _path(source: str, base: Path) -> Path:
    return base / Path(source).expanduser()
