"""Weights of a transformers model, without what transformers itself would pass over in silence.

transformers fills what the files lack with random numbers, leaves out what the config has no place for, and reads
pickles where there is nothing else. Here the first is refused, the second said, and the third not done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.tasks import TaskError, conv1d
from jobs.tasks.architectures import check_entries

if TYPE_CHECKING:
    import torch

NAMED = 3
"""So many weights are named."""


def load(
    source: Any,
    directory: Path | str,
    dtype: torch.dtype | None,
    config: Mapping[str, Any],
    may_lack_head: bool = False,
) -> tuple[Any, list[str]]:
    """Load a model directory or a hub id; return the model, in evaluation mode, and what is to be said about it.

    Args:
        source: the class of transformers whose `from_pretrained` reads it.
        dtype: what the weights become; None: what they are.
        config: entries that override the model's own; a `quantization_config` may be an object of transformers.
        may_lack_head: what lies outside the base model, and its pooler, may be missing: it is random until trained.

    Raises:
        TaskError: it cannot be read, is a pickle, or lacks weights; or `config` has an entry that the model has not.
    """
    from transformers import AutoConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin

    settings = {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
    entries = {key: value for key, value in config.items() if not isinstance(value, QuantizationConfigMixin)}
    try:
        own = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        check_entries(own.model_type, own, entries)
        model, found = (conv1d.class_of(directory) or source).from_pretrained(
            str(directory), dtype=dtype or "auto", ignore_mismatched_sizes=True, **settings, **config
        )
    except TaskError:
        raise
    except (OSError, ValueError) as error:
        raise TaskError(f"cannot load a model from {str(directory)!r}: {str(error).splitlines()[0]}") from error
    _check_shapes(directory, found["mismatched_keys"])
    missing = sorted(found["missing_keys"])
    lacking = [name for name in missing if not (may_lack_head and _is_head(model, name))]
    if lacking:
        raise TaskError(
            f"the weights in {str(directory)!r} are not whole: {_counted(lacking)} of {type(model).__name__} missing, "
            "which would be random. They are of another model or layout, or model.config asks for more than there is"
        )
    said = [f"{directory} lacks {_counted(missing)}: random until trained"] if missing else []
    if unexpected := sorted(found["unexpected_keys"]):
        said.append(f"{directory} holds {_counted(unexpected)} that {type(model).__name__} has no place for: left out")
    return model.eval(), said


def _check_shapes(directory: Path | str, mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]]) -> None:
    for name, written, wanted in sorted(mismatched):
        raise TaskError(
            f"the weights in {str(directory)!r} do not fit the config: {name} is {tuple(written)} there, and "
            f"{tuple(wanted)} by the config with the entries of model.config"
        )


def _is_head(model: Any, name: str) -> bool:
    prefix = getattr(model, "base_model_prefix", "")
    return bool(prefix) and (not name.startswith(f"{prefix}.") or ".pooler." in name)


def _counted(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} weight{'s' * (len(names) > 1)} ({', '.join(names[:NAMED])}{more})"
