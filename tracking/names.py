"""Names that become paths, URIs or search filters: checked here, because the MLflow server accepts nearly anything."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from tracking.errors import TrackingError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION_LIKE = re.compile(r"v?\d+|latest", re.IGNORECASE)


def check_name(kind: str, value: str) -> str:
    """Return `value` if it is safe as a path component and in a URI, else raise TrackingError. `kind` names it."""
    if not _NAME.fullmatch(value) or value.endswith("."):
        raise TrackingError(
            f"{kind} {value!r} is not a valid name: use letters, digits, '.', '_' and '-', "
            "starting with a letter or digit, 128 characters at most"
        )
    return value


def check_alias(value: str) -> str:
    """Return `value` if it can be a model alias; what reads like a version (`3`, `v3`, `latest`) cannot."""
    if _VERSION_LIKE.fullmatch(value):
        raise TrackingError(f"alias {value!r} reads like a version: use a word such as 'champion'")
    return check_name("alias", value)


def suggest(wrong: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the closest known name, or all of them."""
    names = sorted(known)
    if not names:
        return "there are none yet"
    close = get_close_matches(wrong, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
