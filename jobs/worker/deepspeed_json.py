"""A user's DeepSpeed JSON: read, checked key by key, and left with what DeepSpeed honours under Tandem's loop. Pure.

All that is wrong is said at once. What asks for nothing is taken out: "auto" (the Hugging Face convention for "you
decide"), null, a section with `enabled: false`, and values that a key has anyway.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.unique_keys import unique
from jobs.worker.deepspeed_keys import LEAF, OFFLOAD, SPEC, STAGE3_NAMES, TOP, ZERO, Honoured, Refused

Table = Mapping[str, Honoured | Refused]
NVME = (
    'device "nvme" needs a folder for each start of the run, which Tandem makes: write training.deepspeed: '
    "{zero_stage: 3, offload: nvme, nvme_path: /a/fast/disk} instead of a JSON"
)
_PRINTING = ("debug", "info")
_INNER = {"offload_optimizer": OFFLOAD, "offload_param": OFFLOAD, "leaf_module": LEAF}
_IN_SPEC = {
    key: Refused(f"the spec's `training` section decides that ({where}); remove it") for key, where in SPEC.items()
}
_ALL = {**TOP, **_IN_SPEC}
_ZERO = {**ZERO, **{f"stage3_{name}": ZERO[name] for name in STAGE3_NAMES}}


def read(path: Path) -> dict[str, Any]:
    """Return what a JSON file asks of DeepSpeed.

    Raises:
        UserError: unreadable; or a key that DeepSpeed does not know, that the spec decides, that nothing would come of,
            or that would change what is learned. One line for each.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError) as error:
        raise UserError(f"training.deepspeed: cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"training.deepspeed: {path} holds a {type(config).__name__}, not an object")
    config = without_nothing(_without_auto(config))
    if wrong := list(mistakes(config)):
        raise UserError("\n".join(f"{path}: {each}" for each in wrong))
    return config


def mistakes(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong in a configuration that is to be DeepSpeed's, a sentence each."""
    zero = config.get("zero_optimization", {})
    zero = zero if isinstance(zero, dict) else {}
    stage = zero.get("stage", 0)
    yield from _wrong(config, _ALL, "", None)
    for key in config:
        rule = TOP.get(key)
        if isinstance(rule, Honoured) and rule.needs_log and config.get("log_level") not in _PRINTING:
            yield f'`{key}` prints nothing unless `log_level` is "info"; set that too, or remove `{key}`'
    yield from _wrong(zero, _ZERO, "zero_optimization.", stage)
    for key, table in _INNER.items():
        if isinstance(zero.get(key), dict):
            yield from _wrong(zero[key], table, f"zero_optimization.{key}.", None)
    for name in STAGE3_NAMES:
        if name in zero and f"stage3_{name}" in zero:
            yield f"`zero_optimization.{name}` and `stage3_{name}` are one setting; remove one of them"


def without_nothing(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the keys that are refused, at values that ask for nothing."""
    kept = _asking(config, _ALL)
    zero = kept.get("zero_optimization")
    if isinstance(zero, dict):
        zero = _asking(zero, _ZERO)
        inner = {key: _asking(zero[key], _INNER[key]) for key in _INNER if isinstance(zero.get(key), dict)}
        kept["zero_optimization"] = {**zero, **inner}
    return kept


def _asking(section: dict[str, Any], table: Table) -> dict[str, Any]:
    return {key: value for key, value in section.items() if not _is_nothing(value, key, table)}


def _is_nothing(value: Any, key: str, table: Table) -> bool:
    rule = table.get(key)
    if not isinstance(rule, Refused) or key in ("bf16", "bfloat16", "torch_autocast"):  # off is a precision too
        return False
    off = isinstance(value, dict) and value.get("enabled") is False
    return off or value in rule.nothing


def _wrong(section: Mapping[str, Any], table: Table, place: str, stage: Any) -> Iterator[str]:
    for key, value in section.items():
        rule = table.get(key)
        if rule is None:
            yield f"`{place}{key}` is no key that DeepSpeed 0.19 knows{_meant(key, table, place)}"
        elif isinstance(rule, Refused):
            yield f"`{place}{key}`: {rule.why}"
        elif key == "device" and value == "nvme":
            yield f"`{place}{key}`: {NVME}"
        elif not rule.takes.fits(value):
            yield f"`{place}{key}` is {_shown(value)}; it takes {rule.takes.words}"
        elif stage in (0, 1, 2, 3) and stage not in rule.stages:
            stages = " and ".join(map(str, rule.stages))
            yield f"`{place}{key}` has an effect at ZeRO stage {stages} alone, and the stage is {stage}; remove it"


def _meant(key: str, table: Table, place: str) -> str:
    """Say where a key that is not known here may belong."""
    for other, known in (("", _ALL), ("zero_optimization.", _ZERO)):
        if other != place and key in known:
            return f" there: `{other}{key}` is one; move it"
    close = difflib.get_close_matches(key, [name for name in table if isinstance(table[name], Honoured)], n=1)
    close = close or difflib.get_close_matches(key, list(table), n=1)
    return f"; did you mean `{place}{close[0]}`?" if close else "; remove it"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _without_auto(value: Any) -> Any:
    """Leave "auto" and null out, and the sections that hold nothing else."""
    if not isinstance(value, dict):
        return value
    kept = {key: _without_auto(inner) for key, inner in value.items() if inner not in ("auto", None)}
    return {key: inner for key, inner in kept.items() if inner != {} or value[key] == {}}
