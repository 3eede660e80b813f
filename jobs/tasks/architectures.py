"""Configs of transformers architectures, without what transformers itself would pass over in silence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from jobs.tasks import TaskError


def config_for(architecture: str, config: dict[str, Any], table: str, kind: str) -> Any:
    """Make the transformers config, refusing an unknown architecture or key: transformers itself ignores a typo.

    Args:
        table: the name of transformers' own table of the architectures that can do the task.
        kind: what these are called in the message: "causal".
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    known = getattr(modeling_auto, table)
    if architecture not in known:
        hint = close(architecture, known)
        raise TaskError(f"model.architecture: {architecture!r} is no {kind} architecture of transformers{hint}")
    default = AutoConfig.for_model(architecture)
    for key in config:
        if not hasattr(default, key):
            raise TaskError(f"model.config: {architecture} has no {key!r}{close(key, default.to_dict())}")
    try:
        return AutoConfig.for_model(architecture, **config)
    except Exception as error:  # transformers validates configs with several kinds of exception
        raise TaskError(f"model.config for {architecture}: {str(error).strip().splitlines()[-1].strip()}") from error


def close(word: str, known: Iterable[str]) -> str:
    """Return a suggestion to append to a message, or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
