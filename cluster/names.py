"""The names of jobs, models, aliases and endpoints: one rule, and the types by which specs hold to it.

Names become paths, URIs, actor names and search filters, and the MLflow server accepts nearly anything.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

from cluster.errors import UserError

LONGEST = 100
LONGEST_KEY = 160
"""Keys that are made of a name and a digest are longer."""
PATTERN = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?"
_VERSION_LIKE = re.compile(r"v?\d+|latest", re.IGNORECASE)


def check_name(kind: str, value: str, longest: int = LONGEST) -> str:
    """Return `value` if it is safe as a part of paths and URIs. `kind` says what it names, for the message.

    Raises:
        UserError: it is not.
    """
    if not re.fullmatch(PATTERN, value) or len(value) > longest:
        raise UserError(
            f"{kind} {value!r} is not a valid name: use letters, digits, '.', '_' and '-', starting with a letter or "
            f"digit and not ending in '.', {longest} characters at most"
        )
    return value


def check_key(kind: str, value: str) -> str:
    """Return `value` if it is made of a name and of what tells it from others of that name."""
    return check_name(kind, value, LONGEST_KEY)


def check_alias(value: str) -> str:
    """Return `value` if it can be the alias of a model version; what reads like a version (`3`, `v3`, `latest`) cannot.

    Raises:
        UserError: it is no name, or reads like a version.
    """
    if _VERSION_LIKE.fullmatch(value):
        raise UserError(f"alias {value!r} reads like a version: use a word such as 'champion'")
    return check_name("alias", value)


def suggest(wrong: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the closest known name, or all of them."""
    names = sorted(known)
    if not names:
        return "there are none yet"
    close = difflib.get_close_matches(wrong, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def _name(value: str) -> str:
    try:
        return check_name("name", value)
    except UserError as error:
        raise ValueError(str(error)) from None  # what pydantic collects, with the line in the spec


def _alias(value: str) -> str:
    try:
        return check_alias(value)
    except UserError as error:
        raise ValueError(str(error)) from None


Name = Annotated[
    str, AfterValidator(_name), WithJsonSchema({"type": "string", "pattern": f"^{PATTERN}$", "maxLength": LONGEST})
]
"""The name of a job, of a model or of an endpoint."""
Alias = Annotated[
    str, AfterValidator(_alias), WithJsonSchema({"type": "string", "pattern": f"^{PATTERN}$", "maxLength": LONGEST})
]
"""The alias of a model version."""
