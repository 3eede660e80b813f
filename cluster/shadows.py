"""Files beside a user's spec that would be imported in place of Tandem's own packages: which, and what then.

Ray puts the folder that travels with a job before the packages that do, and `python -m` puts the current folder before
both. A `cluster.py` or a `jobs/__init__.py` there would hide ours in the driver, in every worker and in what forks
them. So such a file stays at home. A folder of that name without `__init__.py` hides nothing: Python prefers a package
that has one, wherever it lies.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cluster.connect import PACKAGES, packages
from cluster.errors import UserError


def hides(path: Path) -> bool:
    """Say whether a file, by its path below the folder that travels, would be imported in place of a package of ours.

    Pure.
    """
    if len(path.parts) == 1:
        return path.suffix == ".py" and path.stem in PACKAGES
    return path.parts[0] in PACKAGES and path.parts[1:] == ("__init__.py",)


def note(folder: Path) -> str | None:
    """Return what to tell the user about files of `folder` that stay at home; None if all of them travel."""
    kept = [str(path.relative_to(folder)) for path in _hiding(folder) if path.parent not in packages()]
    if not kept:
        return None
    return (
        f"note: {', '.join(kept)} beside the spec is not sent with it: it would hide a package of Tandem's own "
        f"({', '.join(PACKAGES)}); give it another name if your code imports it"
    )


def check_own_module(target: str, folder: Path) -> None:
    """Refuse code of the user's own, `package.module:Class`, that lies in a folder with the name of a package of ours.

    Raises:
        UserError: it could never be imported, since Tandem's own package has that name.
    """
    module, colon, _ = target.partition(":")
    top = module.partition(".")[0]
    if not colon or top not in PACKAGES:
        return
    file = folder.joinpath(*module.split("."))
    if any(path.exists() and path.parent not in packages() for path in (file.with_suffix(".py"), file / "__init__.py")):
        raise UserError(
            f"task {target!r}: {top!r} is the name of one of Tandem's own packages, so a module of yours cannot lie in "
            f"it; rename {folder / top}"
        )


def _hiding(folder: Path) -> Iterable[Path]:
    found = [path for name in PACKAGES for path in (folder / f"{name}.py", folder / name / "__init__.py")]
    return [path for path in found if path.is_file()]
