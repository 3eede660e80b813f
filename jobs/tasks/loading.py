"""Weights of a transformers model, without what transformers itself would pass over in silence.

transformers fills what the files lack with random numbers, leaves out what the config has no place for, and reads
pickles where there is nothing else. Here the first is refused, the second said, and the third not done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.weights_cache import local
from jobs.tasks import TaskError, adapters, conv1d
from jobs.tasks.architectures import check_entries, last_line

if TYPE_CHECKING:
    import torch

NAMED = 3
"""So many weights are named."""
_unread: ContextVar[bool] = ContextVar("_unread", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Have `load` build the model that a directory describes and leave its weights to somebody who reads them in parts.

    What `load` would have refused or said of the weights is theirs too (jobs/worker/weight_match.py).
    """
    token = _unread.set(True)
    try:
        yield
    finally:
        _unread.reset(token)


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
    from transformers.utils.quantization_config import QuantizationConfigMixin

    entries = {key: value for key, value in config.items() if not isinstance(value, QuantizationConfigMixin)}
    try:
        own = _own_config(directory)
        check_entries(own.model_type, own, entries)
        source = conv1d.class_of(directory) or source
        if _unread.get():
            return _described(source, directory, dtype, config), []
        base = adapters.base_of(directory)
        model, found = (
            _from_files(source, directory, dtype or "auto", dict(config))
            if base is None
            else _adapted(source, Path(directory), base, dtype, config)
        )
    except TaskError:
        raise
    except (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError) as error:
        raise TaskError(f"cannot load a model from {str(directory)!r}: {_first_line(error)}") from error
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
    return model.eval(), [*said, *_untied(model)]


def _from_files(source: Any, directory: Path | str, dtype: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Have transformers read a folder; return the model and what it says of its weights.

    Args:
        settings: entries that override the config's, or `config`, which stands in its place.
    """
    here = str(local(directory))  # where its weights lie in a store, a copy that has them
    safe = {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
    model, found = source.from_pretrained(here, dtype=dtype, ignore_mismatched_sizes=True, **safe, **settings)
    _check_shapes(directory, found["mismatched_keys"])
    return model, found


def _adapted(
    source: Any, directory: Path, base: Path, dtype: torch.dtype | None, config: Mapping[str, Any], whole: Any = None
) -> tuple[Any, dict[str, Any]]:
    """Read a base, as a folder of adapters describes it, and put them on; the base may have such a base itself.

    It is read in the wider one of the types that it is stored in and that are wanted, so that it is rounded once.

    Args:
        whole: the config of the adapters on top, where these are not.
    """
    import torch
    from transformers import AutoConfig

    whole = whole or AutoConfig.from_pretrained(str(directory), trust_remote_code=False, **config)
    wanted = dtype or whole.dtype or torch.float32
    wider = torch.promote_types(wanted, _own_config(base).dtype or torch.float32)
    below = adapters.base_of(base)
    model, found = (
        _from_files(source, base, wider, {"config": whole})
        if below is None
        else _adapted(source, base, below, wider, {}, whole)
    )
    model, replaced = adapters.put_on(model, directory)
    found["missing_keys"] = set(found["missing_keys"]) - replaced
    _keep_generation(model, directory)
    return adapters.as_type(model, wanted), found


def _described(source: Any, directory: Path | str, dtype: torch.dtype | None, config: Mapping[str, Any]) -> Any:
    """Build what `from_pretrained` would load, in evaluation mode, with fresh weights."""
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(str(directory), trust_remote_code=False, **config)
    model = source.from_config(whole, dtype=dtype) if hasattr(source, "from_config") else source(whole)
    _keep_generation(model, directory)
    return model.eval()


def _keep_generation(model: Any, directory: Path | str) -> None:
    """Give a model the generation config of a folder, as `from_pretrained` does."""
    if model.can_generate():
        hub = {"cache_dir": None, "force_download": False, "proxies": None, "local_files_only": True, "token": None}
        model.adjust_generation_fn(
            None, False, False, str(directory), revision="main", subfolder="", trust_remote_code=False, **hub
        )


def _untied(model: Any) -> list[str]:
    """Have a model's config say that its head is its own, where the files hold another one than the embedding.

    transformers keeps both then; other readers of the config would put the embedding in the head's place.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if not getattr(config, "tie_word_embeddings", False) or head is None or not hasattr(head, "weight"):
        return []
    embedding = model.get_input_embeddings()  # convolutional models have none, and raise: only one with a head is asked
    if embedding is None or head.weight is embedding.weight:
        return []
    for each in (model.config, config):
        each.tie_word_embeddings = False
    return ["the config ties the head to the embedding, but the files hold a head of its own: it is kept, and untied"]


def check_parent(directory: Path | str, config: Mapping[str, Any], table: str, kind: str) -> Any:
    """Refuse what a model's own config tells that `load` would refuse: another kind of model, or `config`'s entries.

    Returns:
        The config with these entries.

    Args:
        config: entries that are to override the model's own.
        table, kind: as `config_for` takes them.

    Raises:
        TaskError: it would.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    own = _own_config(directory)
    if own.model_type in CONFIG_MAPPING_NAMES and own.model_type not in getattr(modeling_auto, table):
        raise TaskError(f"{str(directory)!r} is a {own.model_type}, which is no {kind} architecture of transformers")
    check_entries(own.model_type, own, config)
    try:
        return AutoConfig.from_pretrained(str(directory), trust_remote_code=False, **config)
    except Exception as error:  # transformers validates configs with several kinds of exception
        raise TaskError(f"model.config for {str(directory)!r}: {last_line(error)}") from error


def _own_config(directory: Path | str) -> Any:
    from transformers import AutoConfig

    try:
        own = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # as above
        raise TaskError(f"cannot load a model from {str(directory)!r}: {_first_line(error)}") from error
    if getattr(own, "auto_map", None):
        raise TaskError(f"{str(directory)!r} has `auto_map` in its config: it needs code of its own, which is not run")
    return own


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


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
