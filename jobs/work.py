"""JobSpec → what the job asks of the machines it is to run on, for manifests and batch scripts.

What the job needs of what `tandem jobs submit` sends is read here: the spec itself, small files beside it that it
names, and all of them where its task is code of the user's own.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster import shipping, specfile
from cluster.errors import UserError
from cluster.work import Group, JobWork, Place
from jobs.data.corpora import BUILT_IN
from jobs.spec import JobSpec
from jobs.submit import ENTRY_POINT

LARGEST_BYTES = 900_000
"""Of the files together: a ConfigMap holds a mebibyte, names and all."""


def read(path: Path, overrides: Sequence[str], name: str | None = None) -> JobWork:
    """Read a job's spec.

    Args:
        name: what the job is called where it runs; the spec's own name when left out.

    Raises:
        UserError: the spec is wrong, or its code is too large to travel with it.
    """
    spec = specfile.load(path, JobSpec, overrides)
    options = [word for override in overrides for word in ("--set", override)]
    wanted = spec.resources
    return JobWork(
        name=name or spec.name,
        entrypoint=shlex.join([*shlex.split(ENTRY_POINT), path.name, *options]),
        files=_files(path, spec),
        metadata={"tandem.name": spec.name, "tandem.phase": spec.phase},
        workers=Group("resources", wanted.fewest, wanted.cpus_per_worker, wanted.gpus_per_worker),
        places=tuple(places(spec)),
        trains=spec.training is not None,
        resumes=spec.checkpoint.resume == "auto",
        saves_every_steps=spec.checkpoint.every_steps,
    )


def places(spec: JobSpec) -> Iterator[Place]:
    """Yield the paths and URIs that the spec names; what it leaves out is in Tandem's home."""
    written = {"storage": spec.storage}
    if spec.training is not None:
        written |= {"checkpoint.directory": spec.checkpoint.directory, "model.export": spec.model.export}
    for key, where in written.items():
        if where is not None:
            yield Place(key, where, written=True)
    read = {**spec.data.trained_on(), "data.eval": spec.data.eval, "data.predict": spec.data.predict}
    for key, what in read.items():
        for where in [what] if isinstance(what, str) else what or []:
            if where not in BUILT_IN:
                yield Place(key, where)
    if spec.model.source is not None and _is_folder(spec.model.source):
        yield Place("model.from", spec.model.source)


def _is_folder(source: str) -> bool:
    """Tell a directory from a version in the registry and from a hub id, `owner/name`."""
    return not source.startswith("models:/") and source.startswith(("/", ".", "~"))


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a spec: some are names of small files beside it, such as a DeepSpeed JSON."""
    if isinstance(value, str):
        yield value.removeprefix("./")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(inner)


def _files(path: Path, spec: JobSpec) -> dict[str, str]:
    """Return what travels: relative path → text."""
    folder, found = path.absolute().parent, {path.name: path.read_text(encoding="utf-8")}
    own_code, named = ":" in spec.task.name, set(_texts(spec.resolved()))
    for file in shipping.small_files(folder):
        below = file.relative_to(folder).as_posix()
        if own_code or below in named:
            found[below] = file.read_text(encoding="utf-8")
    if (size := sum(len(text.encode()) for text in found.values())) > LARGEST_BYTES:
        raise UserError(
            f"{folder}: the small files beside the spec are {size >> 10} KiB, and at most {LARGEST_BYTES >> 10} travel "
            "in a ConfigMap: give the spec and its code a folder of their own, or put the code into the image"
        )
    return found
