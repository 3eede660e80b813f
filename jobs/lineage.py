"""Which model a job really starts from: the version that an alias means now, and what its files hold."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import UserError
from jobs import hub_folder
from jobs.tasks import own_code
from tracking import manifest, registry
from tracking import weights_digest as digests
from tracking.errors import TrackingError


def pinned(source: str | None) -> str | None:
    """Return `model.from` with the version that an alias means, `models:/name/3`; anything else as it is."""
    if source is None or not source.startswith("models:/"):
        return source
    try:
        return registry.find_version(source).uri
    except TrackingError:  # it was found a moment ago: what was written is all that is known now
        return source


def weights_digest(parent: Path | str | None) -> str:
    """Return the SHA-256 (hex) of a model directory's weights and configs, or the commit of a hub id.

    "" where there is no model, or its commit is not known.
    """
    folder = Path(parent) if parent is not None else None
    if folder is None or not folder.is_dir():
        snapshot = hub_folder.cached(str(parent)) if parent is not None else None
        return snapshot.name if snapshot is not None else ""
    return digests.of_folder(folder)


def said_of_pages(parent: Path | str | None) -> list[str]:
    """Say which files of a model directory are too large to be read whole by `weights_digest`."""
    folder = Path(parent) if parent is not None else None
    if folder is None or not folder.is_dir():
        return []
    large = digests.read_in_pages(folder)
    if not large:
        return []
    files = f"{large[0].name}{f' and {len(large) - 1} more files' if len(large) > 1 else ''}"
    return [
        f"{files} of model.from: above {digests.WHOLE >> 30} GiB a file, {digests.PAGES:,} pages all over it tell "
        "whether it changes under this run; a change of single weights between them would not be noticed"
    ]


def check_same(before: str, now: str, parent: str | None) -> None:
    """Refuse to go on from other weights than a run began from: adapters would be put on another model.

    Args:
        before: what the run has noted; "" where it is not known.
        now: `weights_digest` of the model as it is.
        parent: what the model is called.

    Raises:
        UserError: they differ.
    """
    if before and now and before != now:
        raise UserError(
            f"the run cannot go on: since it began, the weights behind model.from ({parent}) changed. Name the version "
            "that it began from (models:/name/1), or begin a new run with --set checkpoint.resume=never; this one "
            "keeps its checkpoints"
        )


def said_of_code(task: str, parent: Path | str | None) -> list[str]:
    """Say that a user's own task is not the code that a model was trained with; nothing where that is not known."""
    try:
        written = manifest.read(Path(parent)) if parent is not None else None
    except TrackingError:
        return []
    said = own_code.difference(task, written.code) if written is not None and written.task == task else None
    return [said] if said else []
