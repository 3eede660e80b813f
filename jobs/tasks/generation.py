"""How a model ends its answers: its parent's generation config, completed by what the tokenizer and template say."""

from __future__ import annotations

from typing import Any

from jobs.tasks.chat_template import turn_end


def fresh(tokenizer: Any) -> Any:
    """Return the generation config of a model that has none: it ends at the end of a text or of a turn."""
    from transformers import GenerationConfig

    return completed(GenerationConfig(), tokenizer)


def completed(config: Any, tokenizer: Any) -> Any:
    """Return a copy of a generation config with what it lacks; what it says (end tokens, sampling) stays.

    A model that learns to end its texts and turns with tokens that are not among its end tokens ends there too.
    """
    from transformers import GenerationConfig

    said = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    given = said.get("eos_token_id")
    ends = list(given) if isinstance(given, list | tuple) else [given] if given is not None else []
    learned = {tokenizer.eos_token_id, turn_end(tokenizer)} - {None}
    said["eos_token_id"] = [*ends, *sorted(learned - set(ends))] or None
    for name in ("bos_token_id", "pad_token_id"):
        if said.get(name) is None:
            said[name] = getattr(tokenizer, name)
    return GenerationConfig(**said)
