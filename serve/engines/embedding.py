"""Texts to embed → vectors, by any engine that makes them; each text is checked before any is computed."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from serve.engines.prompts import TooLong, check_length
from serve.engines.protocol import EmbeddingEngine, RequestError
from serve.wire import EmbedCall, Identity, Vectors

MOST_TOKENS = 300_000
"""Most tokens of all inputs of one request together, as OpenAI has it."""


async def vectors(engine: EmbeddingEngine, call: EmbedCall, identity: Identity) -> Vectors:
    """Return a vector for each input, all of them or none. Raises RequestError and EngineError."""
    if call.dimensions not in (None, engine.embedding_size):
        said = f"this model's vectors have {engine.embedding_size} numbers, and are not shortened"
        raise RequestError("dimensions", said)
    texts = await asyncio.to_thread(token_ids, engine.tokenizer, call, engine.max_context)
    work = [engine.embed(f"{call.request_id}-{at}", ids) for at, ids in enumerate(texts)]
    return Vectors(identity, np.stack(await asyncio.gather(*work)), sum(map(len, texts)))


def token_ids(tokenizer: Any, call: EmbedCall, max_context: int) -> list[tuple[int, ...]]:
    """Return the token ids of each input, special tokens as the tokenizer adds them to a text.

    Raises:
        RequestError: an input has no tokens, unknown ones, or more than the context holds; or all have too many.
    """
    encoded = []
    for at, given in enumerate(call.inputs):
        place = f"input[{at}]" if len(call.inputs) > 1 else "input"
        if isinstance(given, str):
            check_length(tokenizer, given, max_context, place)
        ids = tuple(tokenizer(given)["input_ids"]) if isinstance(given, str) else given
        _check(place, ids, len(tokenizer), max_context)
        encoded.append(ids)
    total = sum(map(len, encoded))
    if total > MOST_TOKENS:
        raise RequestError("input", f"{total} tokens in one request; at most {MOST_TOKENS} are taken")
    return encoded


def _check(place: str, ids: tuple[int, ...], vocabulary: int, max_context: int) -> None:
    if not ids:
        raise RequestError(place, "has no tokens")
    if len(ids) > max_context:
        raise TooLong(place, f"this model's context is {max_context} tokens and this text has {len(ids)}: shorten it")
    if max(ids) >= vocabulary:
        raise RequestError(place, f"token id {max(ids)} is outside the vocabulary of {vocabulary}")
