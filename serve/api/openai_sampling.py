"""How the tokens of an answer are chosen, from a request's fields to what engines take. Pure functions."""

from __future__ import annotations

import json
from typing import Any

from serve.api.body import ApiError, shown
from serve.api.openai_parameters import invalid
from serve.api.openai_requests import Generating
from serve.engines.protocol import RequestError, SamplingParams
from serve.wire import GenerateCall

MOST_STOPS = 4
"""Most stop strings, as OpenAI has it."""
SAMPLING_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "min_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


def sampling(request: Generating, logprobs: int | None, schema: dict[str, Any] | None) -> dict[str, Any]:
    """Return what the client named of how tokens are chosen, as SamplingParams has it. Raises ApiError (400).

    Args:
        logprobs: how many alternatives of each token are told; None: no log-probabilities.
        schema: the JSON schema that the text must follow, checked.
    """
    named: dict[str, Any] = {
        name: getattr(request, name) for name in SAMPLING_FIELDS if getattr(request, name) is not None
    }
    if request.stop:
        named["stop"] = _stop([request.stop] if isinstance(request.stop, str) else request.stop)
    if request.stop_token_ids:
        named["stop_token_ids"] = tuple(request.stop_token_ids)
    if logprobs is not None:
        named["logprobs"] = logprobs
    if request.logit_bias:
        named["logit_bias"] = _logit_bias(request.logit_bias)
    if schema is not None:
        named["json_schema"] = json.dumps(schema)
    return named


def _stop(stops: list[str]) -> tuple[str, ...]:
    if len(stops) > MOST_STOPS:
        raise invalid("stop", f"at most {MOST_STOPS} strings are taken, {len(stops)} were given")
    if "" in stops:
        raise invalid(f"stop[{stops.index('')}]", "is empty, and nothing can end there")
    return tuple(stops)


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    for token in bias:
        if not (token.isascii() and token.isdigit()) or (token[0] == "0" and token != "0"):
            raise invalid("logit_bias", f"{shown(token)} is no token id")
    return {int(token): value for token, value in bias.items()}


def check(call: GenerateCall) -> None:
    """Raise ApiError (400) for values that no model can take."""
    limit = 2**31 if call.max_tokens is None else call.max_tokens
    try:
        SamplingParams(**{**call.sampling, "max_tokens": limit, "prompt_logprobs": call.echo})
    except RequestError as error:
        raise ApiError(400, str(error), code="invalid_value", param=error.field) from None
