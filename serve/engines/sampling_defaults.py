"""What a model's generation_config.json asks for: defaults of requests that name none, and what is not honoured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.errors import UserError

FILE = "generation_config.json"
HONOURED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Settings of sampling that are defaults as they stand. End tokens are the engines' own business."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "penalty_alpha", "diversity_penalty"), (0,)),
    **dict.fromkeys(("num_beams", "typical_p", "encoder_repetition_penalty", "guidance_scale"), (1,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "stop_strings"), ([], "")),
    **dict.fromkeys(("force_words_ids", "constraints"), ([],)),
    "sequence_bias": ({},),
    "max_new_tokens": (),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ()),
    **dict.fromkeys(("top_h", "watermarking_config", "dola_layers"), ()),
}
"""What changes an answer and is not honoured, with the values that change nothing."""


def read(directory: Path) -> dict[str, Any]:
    """Return the fields of SamplingParams that a model sets for requests that do not; greedy where it says so.

    Raises:
        UserError: the file is there and cannot be read.
    """
    config = _config(directory)
    found = {name: config[name] for name in HONOURED if config.get(name) is not None}
    return {**found, "temperature": 0.0} if config.get("do_sample") is False else found


def left_out(directory: Path) -> str | None:
    """Return the sentence about what the file asks for and no request gets; None where there is no such thing."""
    config = _config(directory)
    asked = [
        f"{name}: {json.dumps(config[name])[:60]}"
        for name, neutral in _NEUTRAL.items()
        if config.get(name) is not None and config[name] not in neutral
    ]
    return f"{FILE} asks for what is not honoured here: {', '.join(asked)}" if asked else None


def _config(directory: Path) -> dict[str, Any]:
    path = directory / FILE
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object")
    return config
