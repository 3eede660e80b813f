"""Configs of transformers architectures, without what transformers itself would pass over in silence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from copy import deepcopy
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
    architecture: str,
    config: dict[str, Any],
    table: str,
    kind: str,
    defaults: dict[str, Any] | None = None,
    ours: Iterable[str] = (),
) -> Any:
    """Make the transformers config, refusing an unknown architecture or key: transformers itself ignores a typo.

    Args:
        config: what the user has given.
        defaults: entries that it goes before; those that the architecture has no place for are left out.
        table: the name of transformers' own table of the architectures that can do the task.
        kind: what these are called in the message: "causal".
        ours: architectures of our own that are known to transformers and can do the task.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    known = [*ours, *getattr(modeling_auto, table)]
    if architecture not in known:
        hint = close(architecture, known)
        raise TaskError(f"model.architecture: {architecture!r} is no {kind} architecture of transformers{hint}")
    try:
        default = AutoConfig.for_model(architecture)
    except Exception as error:  # transformers validates configs with several kinds of exception
        raise TaskError(f"model.architecture: {architecture} has no config of its own: {last_line(error)}") from error
    _check_one_model(architecture, default, known)
    check_entries(architecture, default, config)
    fitting = {key: value for key, value in (defaults or {}).items() if _takes(default, key)}
    try:
        return AutoConfig.for_model(architecture, **{**fitting, **config})
    except Exception as error:  # as above
        raise TaskError(f"model.config for {architecture}: {last_line(error)}") from error


def check_builds(source: Any, architecture: str, config: Any) -> None:
    """Refuse a config of which transformers makes no model, by making one without memory.

    Args:
        source: the class of transformers whose `from_config` makes it.
        architecture: what it is called in the message.

    Raises:
        TaskError: it fails.
    """
    import torch

    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            source.from_config(config)
    except Exception as error:  # whatever its modules do with values that do not go together
        raise TaskError(
            f"model.architecture: {architecture} cannot be built with this model.config: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def _check_one_model(architecture: str, default: Any, known: Iterable[str]) -> None:
    """Refuse what is made of several models, of which a job would train one."""
    try:
        text = default.get_text_config()
    except ValueError:  # there are several
        text = None
    if text is default:
        return
    parts = ", ".join(sorted(default.sub_configs)) or "text_config"
    own = getattr(text, "model_type", "")
    instead = f"; choose that of its text alone, {own!r}" if own in known else ""
    raise TaskError(
        f"model.architecture: {architecture!r} is made of several models ({parts}), and a job builds one{instead}"
    )


def _has(config: Any, key: str) -> bool:
    try:
        return hasattr(config, key)
    except Exception:  # there is one for each layer, and no single value
        return True


def _takes(default: Any, key: str) -> bool:
    """Tell whether a config has an entry, and takes another value for it."""
    try:
        setattr(deepcopy(default), key, getattr(default, key))
    except Exception:  # it has none, it is fixed, or there is one for each layer
        return False
    return True


def last_line(error: Exception) -> str:
    """Return the last line of what an error says: transformers' validators put the reason there."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


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
        f"{key!r}{close(key, default.to_dict())}" for key in config if key not in DECIDED and not _has(default, key)
    ]
    if wrong:
        raise TaskError(f"model.config: {architecture} has no {', and no '.join(wrong)}")
    for key, value in config.items():
        if key in DECIDED:
            raise TaskError(f"model.config: {key!r} is no entry for a job to set: {DECIDED[key]}")
        part = vars(default).get(key)
        if isinstance(part, PretrainedConfig) and isinstance(value, Mapping):
            check_entries(f"{architecture}.{key}", part, value)


def positions(config: Any) -> tuple[str, int] | None:
    """Return what a config calls the number of its positions, and that number; None where it has no limit."""
    found = ((name, getattr(config, name, None)) for name in LENGTHS)
    return next(((name, value) for name, value in found if isinstance(value, int) and value > 0), None)


def close(word: str, known: Iterable[str]) -> str:
    """Return a suggestion to append to a message, or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
