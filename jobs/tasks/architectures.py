"""Configs of transformers architectures, without what transformers itself would pass over in silence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from jobs.tasks import TaskError

LENGTHS = ("max_position_embeddings", "max_seq_len")
"""What configs call the number of positions; some architectures have none."""
DECIDED = {
    **dict.fromkeys(("dtype", "torch_dtype"), "training.precision says what the model computes in"),
    "quantization_config": "phase quantize makes quantised models",
    "auto_map": "a model with code of its own is not run",
    **dict.fromkeys(("architectures", "model_type"), "model.architecture or model.from says which model it is"),
}
"""Entries of configs that say what model.config does not decide: name → what does."""


def config_for(
    architecture: str, config: dict[str, Any], table: str, kind: str, defaults: dict[str, Any] | None = None
) -> Any:
    """Make the transformers config, refusing an unknown architecture or key: transformers itself ignores a typo.

    Args:
        config: what the user has given.
        defaults: entries that it goes before; those that the architecture has no place for are left out.
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
    check_entries(architecture, default, config)
    fitting = {key: value for key, value in (defaults or {}).items() if hasattr(default, key)}
    try:
        return AutoConfig.for_model(architecture, **{**fitting, **config})
    except Exception as error:  # transformers validates configs with several kinds of exception
        raise TaskError(f"model.config for {architecture}: {str(error).strip().splitlines()[-1].strip()}") from error


def check_entries(architecture: str, default: Any, config: Mapping[str, Any]) -> None:
    """Refuse entries of `model.config` that a transformers config has no place for, also within its parts.

    Args:
        architecture: what it is called in the message.
        default: the config that they go into.

    Raises:
        TaskError: transformers would ignore some, all of which are named, or take one for a setting of its own; or
            Tandem decides it elsewhere.
    """
    from transformers import PretrainedConfig

    wrong = [
        f"{key!r}{close(key, default.to_dict())}" for key in config if key not in DECIDED and not hasattr(default, key)
    ]
    if wrong:
        raise TaskError(f"model.config: {architecture} has no {', and no '.join(wrong)}")
    for key, value in config.items():
        if key in DECIDED:
            raise TaskError(f"model.config: {key!r} is no entry for a job to set: {DECIDED[key]}")
        part = getattr(default, key)
        if isinstance(part, PretrainedConfig) and isinstance(value, Mapping):
            check_entries(f"{architecture}.{key}", part, value)


def positions(config: Any) -> tuple[str, int] | None:
    """Return what a config calls the number of its positions, and that number; None where it has no limit."""
    found = ((name, getattr(config, name, None)) for name in LENGTHS)
    return next(((name, value) for name, value in found if isinstance(value, int)), None)


def close(word: str, known: Iterable[str]) -> str:
    """Return a suggestion to append to a message, or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
