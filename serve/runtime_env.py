"""What a served model's `runtime_env` may hold. Only the standard library: a spec is checked without Ray."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

ALLOWED = ("env_vars", "image_uri", "pip", "py_executable")
"""What may be set. Ray knows more; what is not named here would replace Tandem's own code or act on nothing."""

RESERVED = frozenset({"PYTHONPATH", "PYTHONHOME", "LD_PRELOAD", "LD_LIBRARY_PATH", "PATH", "CUDA_VISIBLE_DEVICES"})
"""Variables by which Ray and Tandem find their code, their libraries and the GPUs that Ray reserved."""
RESERVED_PREFIXES = ("RAY_", "MLFLOW_", "TANDEM_")

Problem = tuple[tuple[str | int, ...], str, Any]
"""The place below `runtime_env`, what is wrong there, and the value."""


def mistakes(environment: Mapping[str, Any]) -> list[Problem]:
    """List everything that `environment` may not say: fields, variables and values, each with its place."""
    return [problem for field, value in environment.items() for problem in _field(field, value)]


def _field(field: str, value: Any) -> Iterator[Problem]:
    if field == "env_vars":
        yield from _variables(value)
    elif field == "pip":
        yield from _packages(value)
    elif field not in ALLOWED:
        close = difflib.get_close_matches(field, ALLOWED, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"it may hold {', '.join(ALLOWED)}"
        yield (field,), f"cannot be set for a served model; {hint}", value
    elif not isinstance(value, str) or not value.strip():
        yield (field,), "must be text, and not empty", value


def _variables(value: Any) -> Iterator[Problem]:
    if not isinstance(value, Mapping):
        yield ("env_vars",), "must be a mapping of names to texts", value
        return
    for name, text in value.items():
        place = ("env_vars", str(name))
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            yield place, f"{name!r} is no name of an environment variable", text
        elif name in RESERVED or name.startswith(RESERVED_PREFIXES):
            yield place, f"{name} is reserved: Ray and Tandem set it for replicas themselves; leave it out", text
        elif not isinstance(text, str):
            yield place, 'must be text: put it in quotes, as in "1"', text
        elif "\0" in text:
            yield place, "holds a NUL character, which no environment variable can", text


def _packages(value: Any) -> Iterator[Problem]:
    if not isinstance(value, list) or not value:
        yield ("pip",), "must be a list of requirements, for instance [einops==0.8.1]", value
        return
    for index, requirement in enumerate(value):
        if not isinstance(requirement, str) or not requirement.strip():
            yield ("pip", index), "must be a requirement as text, for instance einops==0.8.1", requirement
