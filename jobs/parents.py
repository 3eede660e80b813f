"""What a job starts from, a model or an architecture: found, or refused before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cluster.errors import UserError
from jobs.spec import JobSpec
from jobs.tasks import get
from tracking import model_folder, registry
from tracking.address import known_uri
from tracking.errors import ServerUnreachable, TrackingError

FULL_PRECISION = ("finetune", "pretrain", "quantize")
"""Phases that cannot start from quantised weights."""


def find(spec: JobSpec, base: Path) -> Path | str | None:
    """Return the directory behind `model.from`, or the hub id; None for a model with fresh weights.

    Args:
        base: where relative paths start.

    Raises:
        UserError: there is no such model, or it cannot do: it is quantised, needs code of its own, or is a pickle.
    """
    source = spec.model.source
    if source is None:
        check_architecture(spec, base)
        return None
    if source.startswith("models:/"):
        version = registry.find_version(source)
        check_version(spec, source, version)
        found = registry.resolve(version.uri)
    elif _is_path(source, base):
        found = registry.resolve(str(_path(source, base)))
    else:
        if (cached := _cached(source)) is not None:
            check_folder(spec, source, cached)
        return source
    check_folder(spec, source, found)
    return found


def preflight(
    spec: JobSpec, base: Path, tracking: str | None = None, also: Callable[[JobSpec, Path, Path], None] | None = None
) -> str | None:
    """Refuse what is known about `model.from` without a cluster; return what is missing, in a sentence.

    A folder is looked at where it is on this machine, a version where the registry answers. What is not there yet may
    come before the job does, so that is for the caller to judge.

    Args:
        base: where relative paths start.
        tracking: address of the registry, if not that of the environment.
        also: a further check, called with the spec, `base` and the folder where that is on this machine.

    Raises:
        UserError: as `find`, and for a `models:/` URI that is none.
    """
    source = spec.model.source
    if source is None:
        return None
    if not source.startswith("models:/"):
        folder = _path(source, base) if _is_path(source, base) else _cached(source)
        if folder is not None and not folder.is_dir():
            return f"model.from: no model directory at {folder} on this machine"
        if folder is not None:
            check_folder(spec, source, folder)
            _call(also, spec, base, folder)
        return None
    registry.parse(source)
    address = tracking or known_uri()
    if address is None:
        return None
    try:
        version = registry.find_version(source, address)
    except ServerUnreachable:
        return None
    except TrackingError as error:
        return f"model.from: {error}"
    check_version(spec, source, version, address)
    if version.source.startswith("dir:") and version.directory.is_dir():
        check_folder(spec, source, version.directory)
        _call(also, spec, base, version.directory)
    return None


def _call(also: Callable[[JobSpec, Path, Path], None] | None, spec: JobSpec, base: Path, folder: Path) -> None:
    if also is not None:
        also(spec, base, folder)


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


def check_folder(spec: JobSpec, source: str, folder: Path) -> None:
    """Refuse a folder that needs code of its own, holds pickles, or is quantised where the phase needs whole weights.

    Raises:
        UserError: it does.
    """
    model_folder.check(folder, f"model.from: {source}")
    method = model_folder.quantisation(folder)
    if method is not None and spec.phase in FULL_PRECISION:
        raise UserError(
            f"model.from: {source} is quantised ({method}), and phase {spec.phase} needs weights in full precision: "
            "choose the model that it was made from"
        )


def _is_path(source: str, base: Path) -> bool:
    return _path(source, base).exists() or source.startswith(("/", ".", "~"))


def _path(source: str, base: Path) -> Path:
    return base / Path(source).expanduser()


def _cached(repository: str) -> Path | None:
    """Return the folder where this machine keeps a model of the Hugging Face hub, if it does."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(repository, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None
