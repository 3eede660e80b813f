"""How a model ends its answers: its parent's generation config, completed by what the tokenizer and template say."""

from __future__ import annotations

from collections.abc import Mapping
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


PLAIN = ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
         "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")  # fmt: skip
"""Entries of a generation config that are a token's number, or several."""
NESTED = ("bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias")
"""Entries that hold numbers of tokens in other ways."""


def renumbered(model: Any, before: Any | None, tokenizer: Any) -> list[str]:
    """Give a model's configs the numbers that another tokenizer gives the same tokens; return what is to be said.

    A token that it has not is left out: its number would stand for another text.

    Args:
        model: a parent's; its config and its generation config are changed.
        before: the parent's tokenizer; None: it has none, and nothing is known of its numbers.
        tokenizer: the one that the model has from now on.
    """
    from transformers import GenerationConfig

    given = {key: value for key, value in model.generation_config.to_dict().items() if not key.startswith("_")}
    entries, said = _entries(given, before, tokenizer)
    model.generation_config = GenerationConfig(**{**given, **entries})
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        for key, value in _entries({key: getattr(config, key, None) for key in PLAIN}, before, tokenizer)[0].items():
            setattr(config, key, _told(tokenizer, key) if value is None else value)
    if not said:
        return []
    return [f"task.tokenizer is not that of the model: in its generation config {'; '.join(said)}"]


def _told(tokenizer: Any, key: str) -> int | None:
    """Return what a tokenizer says of an entry; a decoder of its own begins with what begins texts, or with padding."""
    if key == "decoder_start_token_id":
        return next((t for t in (tokenizer.bos_token_id, tokenizer.pad_token_id) if t is not None), None)
    return getattr(tokenizer, key, None)


def _entries(given: Mapping[str, Any], before: Any | None, tokenizer: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the entries of a config that change, and how. Pure."""
    vocabulary = tokenizer.get_vocab()
    same = before is not None and before.get_vocab() == vocabulary
    found: dict[str, Any] = {}
    said = []
    for key in PLAIN if not same else ():
        value = given.get(key)
        numbers = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
        texts = [before.convert_ids_to_tokens(int(number)) if before is not None else None for number in numbers]
        kept = [vocabulary[text] for text in texts if text in vocabulary]
        if kept == numbers:
            continue
        found[key] = (kept or None) if isinstance(value, list | tuple) else next(iter(kept), None)
        was = ", ".join(f"{number} ({text!r})" for number, text in zip(numbers, texts, strict=True))
        said.append(f"{key} {was} becomes {', '.join(map(str, kept)) or 'what the tokenizer says'}")
    for key in NESTED if not same else ():
        if given.get(key):
            found[key] = None
            said.append(f"{key} is left out, since its numbers stand for other tokens")
    return found, said
