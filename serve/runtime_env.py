"""A model's own runtime environment: what a serve spec may say there, and what Ray's failures with it mean."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cluster.redact import MASK, is_secret

KEYS = ("image_uri", "pip", "env_vars", "py_executable")
"""The keys of Ray's runtime environments that a model may set."""
ELSEWHERE = {
    "working_dir": "code of your own is sent from beside the spec",
    "py_modules": "code of your own is sent from beside the spec",
    "container": "name the image as image_uri",
    "uv": "list the packages under pip",
    "conda": "name its interpreter as py_executable",
}
RESERVED = (
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONSTARTUP",
    "LD_PRELOAD",
    "LD_AUDIT",
    "DYLD_INSERT_LIBRARIES",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "__RAY_",
    "RAY_",
    "MLFLOW_",
    "TANDEM_",
)
"""Variables, or beginnings of their names (`RAY_`), on which Tandem or Ray depend in a replica."""
SHOWN = (
    "would be a secret that Ray's dashboard and `ps` show: put it into the environment in which Ray is started on the "
    "nodes; replicas have it from there"
)
_FILE = re.compile(r"(-[rc]|--requirement|--constraint|-e|--editable)[ =]*(\.|(?![ =/])[^:]*$)|\.{1,2}/")
"""Requirements that are a file or a folder beside the spec; absolute paths may be there on every node."""
_TELLING = re.compile(r"No matching distribution|Could not find a version|ERROR:|manifest unknown|[Ee]rror:|not found")


class Mistake(NamedTuple):
    """Something that a runtime environment cannot hold, with its place below `runtime_env`."""

    place: tuple[str | int, ...]
    message: str
    value: Any


def mistakes(given: Mapping[str, Any]) -> Iterator[Mistake]:
    """Yield what is wrong with a model's `runtime_env`. Pure."""
    for key, value in given.items():
        if key not in KEYS:
            yield Mistake((str(key),), f"cannot be set: {ELSEWHERE.get(key) or _hint(str(key))}", value)
        elif key == "env_vars":
            yield from _wrong_variables(value)
        elif key == "pip":
            yield from _wrong_packages(value)
        elif not isinstance(value, str) or not value.strip():
            yield Mistake((key,), "must be a text", value)
    if "image_uri" in given and len(given.keys() - {"env_vars"}) > 1:
        yield Mistake(("image_uri",), "stands alone, with env_vars at most: an image brings its packages", given)
    elif {"pip", "py_executable"} <= given.keys():
        yield Mistake(("pip",), "cannot stand beside py_executable: Ray would use one of the two Pythons", given["pip"])


def _hint(key: str) -> str:
    close = difflib.get_close_matches(key, KEYS, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(KEYS)}"


def _wrong_variables(given: Any) -> Iterator[Mistake]:
    if not isinstance(given, Mapping):
        yield Mistake(("env_vars",), "must be a mapping of names to texts", given)
        return
    for name, value in given.items():
        place = ("env_vars", str(name))
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield Mistake(place, "is no name of a variable", name)
        elif reserved := _reserved(name):
            yield Mistake(place, reserved, value)
        elif is_secret(name):
            yield Mistake(place, SHOWN, MASK)
        elif not isinstance(value, str) or "\0" in value:
            yield Mistake(place, "must be a text; put a number or a word like true in quotes", value)


def _reserved(name: str) -> str | None:
    """Say why a variable may not be set. In another case it acts on nothing, where names have a case at all."""
    upper = name.upper()
    if upper not in RESERVED and not upper.startswith(tuple(r for r in RESERVED if r.endswith("_"))):
        return None
    meant = "" if name == upper else f", and would be {upper} in capitals"
    return f"is reserved: Tandem and Ray depend on it in a replica{meant}"


def _wrong_packages(given: Any) -> Iterator[Mistake]:
    if not isinstance(given, list) or not given:
        yield Mistake(("pip",), "must be a list of requirements, such as [sentencepiece==0.2.0]", given)
        return
    for number, requirement in enumerate(given):
        if not isinstance(requirement, str) or not requirement.strip() or "\n" in requirement:
            yield Mistake(("pip", number), "must be one requirement, as pip reads it", requirement)
        elif _FILE.match(requirement.strip()):
            yield Mistake(("pip", number), "names a file, which the nodes do not have: list what it holds", requirement)


def sentence(message: str) -> str:
    """Return what a failure to deploy says, without Ray's tracebacks. Pure."""
    if "runtime_env" not in message and "runtime environment" not in message.lower():
        return message
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING.search(line)]
    reason = (telling or lines or [message])[-1]
    return f"its runtime_env cannot be set up on a node: {reason[:500]}"
