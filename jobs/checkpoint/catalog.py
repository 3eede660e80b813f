"""Checkpoints that can be trusted: shards first, a manifest of their digests last.

    <root>/step-00000100/<attempt>-00000-of-00002.safetensors   one shard per rank (jobs/checkpoint/shards.py)
                         <attempt>-buffers.safetensors          what a model learns outside its parameters
                         MANIFEST.json                          written last, by rank 0

Neither DeepSpeed's `latest` nor Ray Train's snapshot decides what exists: without a manifest that verifies there is no
checkpoint, and a resume takes the newest one that verifies and says what it skipped. Files carry the attempt's name,
and only the newest attempt commits and deletes (jobs/checkpoint/fence.py), so that a worker of an earlier one that
comes back from the dead spoils nothing.

An object store cannot be asked to write only what is not there. So there each attempt writes a manifest of its own,
MANIFEST-<number in the fence>-<attempt>.json, and of several in a folder the one with the highest number counts: one
that is written late, after the fence was asked, replaces nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

from jobs.checkpoint.fence import Fence, Superseded
from jobs.checkpoint.shards import Reader
from jobs.checkpoint.store import Store, Written

MANIFEST = "MANIFEST.json"
BUFFERS = "buffers.safetensors"
FORMAT = 2
_FOLDER = re.compile(r"^step-(\d{8,})$")
_MANIFEST = re.compile(r"^MANIFEST(?:-(\d{8,})-(.+))?\.json$")
_PLAIN_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is. The step is the whole position: batches and learning rate follow from it."""

    step: int
    updates: int
    """Optimizer updates behind it: the step, less the batches that were left out."""
    world_size: int
    zero_stage: int
    files: Mapping[str, Written] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last evaluation before it."""
    elements: Mapping[str, int] = field(default_factory=dict)
    """Elements of each trained parameter: what the shards hold together. Empty in checkpoints from before it was."""
    data: str = ""
    """Digest of the encoded rows that it has learned from. Empty in checkpoints from before it was."""
    order: int = 1
    """Version of the order in which its run visits rows (jobs/data/batches.py). 1 in checkpoints from before it was."""
    learned: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Of each source of a mixture, how many rows and terms of the loss it has learned from (jobs/worker/learned.py)."""

    @property
    def shards(self) -> list[str]:
        """The names of the files that hold fragments."""
        return [name for name in self.files if not name.endswith(BUFFERS)]

    @property
    def buffers(self) -> str | None:
        """The name of the file of the model's buffers, if it has any."""
        return next((name for name in self.files if name.endswith(BUFFERS)), None)


def folder(step: int) -> str:
    """Return the name of a step's folder."""
    return f"step-{step:08d}"


def shard_name(attempt: str, rank: int, world_size: int) -> str:
    """Return the name of a rank's shard."""
    return f"{attempt}-{rank:05d}-of-{world_size:05d}.safetensors"


def commit(store: Store, manifest: Manifest, fence: Fence | None = None) -> None:
    """Make a checkpoint valid: all its files are in place.

    Raises:
        ShardError: its shards are not the model's `elements`, each once. Nothing was written.
        Superseded: the attempt is not the newest any more. Nothing was written that counts beside a newer one's.
    """
    check_whole(store, manifest)
    text = json.dumps({"format": FORMAT, **asdict(manifest)}).encode()
    if fence is not None and not store.creates:
        fence.check()
        store.write(f"{folder(manifest.step)}/MANIFEST-{fence.number:08d}-{fence.attempt}.json", [text])
        fence.check()
        return
    name = f"{folder(manifest.step)}/{MANIFEST}"
    replaces = store.exists(name)
    if fence is not None:
        fence.check()
    try:
        # What was not there before the check must not be there now: this process may have slept for long between them.
        store.write(name, [text], new=not replaces)
    except FileExistsError as error:
        raise Superseded(f"a newer attempt has committed step {manifest.step}; this one has come back late") from error


def _manifest(store: Store, step: int) -> str | None:
    """Return the name of a step's manifest that counts; None: there is none."""
    name = f"{folder(step)}/{MANIFEST}"
    if store.creates:
        return name if store.exists(name) else None
    found = filter(None, map(_MANIFEST.match, store.files(folder(step))))
    newest = max(found, key=lambda match: (int(match[1] or 0), match[2] or ""), default=None)
    return f"{folder(step)}/{newest[0]}" if newest is not None else None


def check_whole(store: Store, manifest: Manifest) -> None:
    """Compare what the shards' headers say with the model's elements; a few bytes of each file are read.

    Raises:
        ShardError: something is missing, is there twice, or is of another model.
    """
    if manifest.elements:
        names = [f"{folder(manifest.step)}/{name}" for name in manifest.shards]
        Reader(store, names).check_whole(manifest.elements)


def steps(store: Store) -> list[int]:
    """List the steps that have a folder, valid or not, newest first."""
    found = [_FOLDER.match(name) for name in store.folders()]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def complete(store: Store) -> list[int]:
    """List the steps whose checkpoint has been completed, newest first; whether it verifies is another question."""
    return [step for step in steps(store) if _manifest(store, step) is not None]


def read(store: Store, step: int) -> Manifest | str:
    """Return the manifest of a step, or what is wrong with it."""
    try:
        if (name := _manifest(store, step)) is None:
            return "no manifest, so it was never completed"
        values = json.loads(store.read(name))
    except FileNotFoundError:
        return "no manifest, so it was never completed"
    except (OSError, ValueError):
        return "the manifest is unreadable"
    return _parse(values, step)


def verify(store: Store, manifest: Manifest, *, rank: int = 0, world_size: int = 1) -> str | None:
    """Compare this rank's share of the files with the manifest; return what is wrong, or None."""
    for name in sorted(manifest.files)[rank::world_size]:
        wanted = manifest.files[name]
        try:
            found = store.digest(f"{folder(manifest.step)}/{name}")
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} is unreadable: {error}"
        if found.size != wanted.size:
            return f"{name} has {found.size} bytes instead of {wanted.size}"
        if found.sha256 != wanted.sha256:
            return f"{name} is corrupt (its digest differs)"
    return None


def newest_valid(
    store: Store,
    *,
    agreed: Callable[[Callable[[], Any]], Any] = lambda produce: produce(),
    check: Callable[[Store, Manifest], str | None] = verify,
) -> tuple[Manifest | None, list[str]]:
    """Return the newest checkpoint that verifies, and why each newer one was skipped.

    Args:
        agreed: makes a value, the same one on all ranks of a group (jobs/checkpoint/resume.py).
        check: says what is wrong with a checkpoint, or None.
    """
    skipped: list[str] = []
    for step in agreed(partial(steps, store)):
        manifest = agreed(partial(read, store, step))
        problem = manifest if isinstance(manifest, str) else check(store, manifest)
        if problem is None:
            return manifest, skipped
        skipped.append(f"{folder(step)}: {problem}")
    return None, skipped


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the newest ones, and those that did best."""

    newest: int = 2
    best: int = 0
    metric: str = "loss"
    """A metric of the evaluation."""
    better: Literal["max", "min"] = "min"
    """Which way is better: the task says."""


def expendable(manifests: Sequence[Manifest], keep: Keep) -> list[int]:
    """Return the steps that need not stay; one whose metric is NaN or infinite did not do best. Pure."""
    by_age = sorted(manifests, key=lambda manifest: -manifest.step)
    rated = [manifest for manifest in by_age if math.isfinite(manifest.metrics.get(keep.metric, math.nan))]
    sign = -1 if keep.better == "max" else 1
    by_merit = sorted(rated, key=lambda manifest: sign * manifest.metrics[keep.metric])
    kept = {manifest.step for manifest in [*by_age[: keep.newest], *by_merit[: keep.best]]}
    return sorted(manifest.step for manifest in manifests if manifest.step not in kept)


def remove_old(store: Store, keep: Keep, fence: Fence | None = None) -> None:
    """Remove what need not stay, and what was never completed below the newest valid manifest.

    Raises:
        Superseded: the attempt is not the newest any more.
    """
    found = {step: read(store, step) for step in steps(store)}
    complete = [manifest for manifest in found.values() if isinstance(manifest, Manifest)]
    newest = max((manifest.step for manifest in complete), default=0)
    torn = [step for step, manifest in found.items() if isinstance(manifest, str) and step < newest]
    for step in [*expendable(complete, keep), *torn]:
        if fence is not None:
            fence.check()
        store.remove(folder(step))


def _parse(values: Any, step: int) -> Manifest | str:
    try:
        if values["format"] != FORMAT:
            return f"its format is {values['format']}, this is for {FORMAT}"
        files = {name: Written(int(file["size"]), str(file["sha256"])) for name, file in values["files"].items()}
        manifest = Manifest(
            step=int(values["step"]),
            updates=int(values["updates"]),
            world_size=int(values["world_size"]),
            zero_stage=int(values["zero_stage"]),
            files=files,
            metrics={key: float(value) for key, value in values["metrics"].items()},
            elements={key: int(value) for key, value in values.get("elements", {}).items()},
            data=str(values.get("data", "")),
            order=int(values.get("order", 1)),
            learned={name: list(map(int, sums)) for name, sums in values.get("learned", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return "the manifest does not hold what it should"
    strange = [name for name in files if not _PLAIN_NAME.match(name)]
    if strange or not files or manifest.step != step:
        return f"the manifest names {strange[0]!r}" if strange else "the manifest does not hold what it should"
    return manifest
