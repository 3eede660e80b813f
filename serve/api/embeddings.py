"""OpenAI's /v1/embeddings: the body is parsed strictly into a call, vectors become the answer. Pure functions."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.api.openai_parameters import invalid, validate
from serve.api.openai_requests import EmbeddingsRequest
from serve.api.texts import texts
from serve.wire import EmbedCall, Vectors

MOST_INPUTS = 2048
"""Most inputs of one request, as OpenAI has it."""


@dataclass(frozen=True)
class Embedding:
    """A parsed request."""

    call: EmbedCall
    as_base64: bool
    """Send each vector as base64 of little-endian float32, as openai-python asks by default."""


def parse(body: dict[str, Any], request_id: str) -> Embedding:
    """Parse the body of /v1/embeddings. Raises ApiError (400) naming the parameter at fault."""
    request = validate(EmbeddingsRequest, body)
    inputs = texts(request.input, "input")
    if len(inputs) > MOST_INPUTS:
        raise invalid("input", f"{len(inputs)} texts in one request; at most {MOST_INPUTS} are taken")
    if "" in inputs:
        at = inputs.index("")
        raise invalid(f"input[{at}]" if len(inputs) > 1 else "input", "is empty")
    call = EmbedCall(f"embd-{request_id}", tuple(inputs), request.dimensions)
    return Embedding(call, request.encoding_format == "base64")


def answer(model: str, wanted: Embedding, vectors: Vectors) -> dict[str, Any]:
    """Return the answer's body: one vector for each input, in their order."""
    encode = _base64 if wanted.as_base64 else np.ndarray.tolist
    data = [{"object": "embedding", "index": at, "embedding": encode(v)} for at, v in enumerate(vectors.values)]
    usage = {"prompt_tokens": vectors.prompt_tokens, "total_tokens": vectors.prompt_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
