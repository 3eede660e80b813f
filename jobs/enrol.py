"""Enrol people, or other identities, with a model of image embeddings: a copy of it that knows whom to name.

    python -m jobs.enrol models:/faces@champion people/ enrolled/ --register faces-enrolled --alias champion

`people/` holds a folder for each identity, with its pictures in it. The copy has `gallery.json` beside the weights, a
vector for each identity, and answers with the one that an image is most like, or "unknown".
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.errors import UserError
from tracking import manifest, registry

BATCH = 64


def enrol(model: str, people: Path, target: Path, threshold: float | None = None) -> list[str]:
    """Copy a model to `target`, with a gallery of those whose pictures lie in `people`; return their names.

    Args:
        model: a version in the registry, `models:/name@alias`, a directory, or a URI of one in a store.
        threshold: from which similarity on somebody is known; None: as the model's own evaluation found best.

    Raises:
        UserError: the model makes no embeddings of images, an image cannot be read, or `target` is there already.
    """
    from jobs.data.sources import open_source
    from jobs.tasks import get
    from jobs.tasks.gallery import UNKNOWN, Gallery
    from jobs.tasks.image_embedding import ImageEmbedding

    source = registry.resolve(registry.located(model, Path()))
    if target.exists():
        raise UserError(f"{target} is there already: name a folder that is not")
    contract = manifest.read(source)
    kind = get(contract.task)
    if not issubclass(kind, ImageEmbedding):
        raise UserError(f"{model} is a model of {contract.task}: identities are enrolled with image-embedding")
    task = kind.load(source)
    network = task.load_model(source)
    names, vectors = _vectors(task, network, open_source(str(people.absolute()), Path()))
    if UNKNOWN in names:
        raise UserError(f"{people}: nobody can be called {UNKNOWN!r}: that is what is answered of strangers")
    shutil.copytree(source, target)
    Gallery.of(names, vectors, threshold).write(target)
    manifest.write(target, contract.model_copy(update={"parent": model}))
    return list(dict.fromkeys(names))


def _vectors(task: Any, network: Any, source: Any) -> tuple[list[str], Any]:
    """Return the identity of each picture, and vectors (N, E) fp32."""
    import numpy as np

    names: list[str] = []
    vectors, waiting = [], list[Any]()
    for example in source.examples():
        try:
            waiting.append(task.instance(example)["image"])
            names.append(task.answer(example))
        except UserError as error:
            raise UserError(f"{example.where}: {error}") from error
        if len(waiting) == BATCH:
            vectors.append(task.vectors(network, waiting))
            waiting = []
    return names, np.concatenate([*vectors, *([task.vectors(network, waiting)] if waiting else [])])


def main(
    model: Annotated[
        str, typer.Argument(help="models:/NAME@ALIAS, models:/NAME/VERSION, a directory, or one in a store (s3://…).")
    ],
    people: Annotated[Path, typer.Argument(help="A folder that holds a folder of pictures for each identity.")],
    target: Annotated[Path, typer.Argument(help="Where the copy with the gallery goes.")],
    threshold: Annotated[float | None, typer.Option(min=-1, max=1, help="From which similarity on, -1 to 1.")] = None,
    register: Annotated[str | None, typer.Option(help="Register the copy as a version of this model.")] = None,
    alias: Annotated[str | None, typer.Option(help="The alias of that version.")] = None,
) -> None:
    """Enrol identities with a model of image embeddings."""
    from jobs import noise

    noise.quiet()
    try:
        if alias is not None and register is None:
            raise UserError(f"--alias {alias} is the alias of a version: name the model with --register")
        names = enrol(model, people, target, threshold)
        typer.echo(f"enrolled {len(names)}: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}")
        if register is not None:
            typer.echo(f"registered {registry.register(register, target, run_id=None, alias=alias).uri}")
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    typer.run(main)
