"""OpenAI's requests: bodies are parsed strictly into calls. Pure functions over JSON values; nothing here knows HTTP,
Ray or a model. The answers are in `serve.api.openai_answers`.

A parameter that would change the answer and cannot be honoured is refused, never ignored: `openai_parameters` has
the table of what may come beside those that are supported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from serve.api import schemas
from serve.api.body import ApiError, shown
from serve.api.openai_messages import conversation
from serve.api.openai_parameters import invalid, missing, validate
from serve.api.openai_requests import ChatRequest, CompletionRequest, Request, ResponseFormat
from serve.api.openai_sampling import check, sampling
from serve.api.openai_tools import tools
from serve.api.texts import texts
from serve.wire import GenerateCall, Prompt

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions; chat has none but the context."""
MOST_TEXTS = 128
"""Most texts of one request: prompts times `n`."""


@dataclass(frozen=True)
class Generation:
    """A parsed request: one call for each text, the `n` of each prompt together, and how to send the answer."""

    model: str
    chat: bool
    request_id: str
    calls: tuple[GenerateCall, ...]
    stream: bool
    include_usage: bool
    n: int = 1
    continuous_usage: bool = False
    """Whether every chunk of a stream tells the usage so far."""

    @property
    def logprobs(self) -> bool:
        """Whether the answer tells log-probabilities."""
        return self.calls[0].sampling.get("logprobs") is not None

    @property
    def tools(self) -> bool:
        """Whether the answer may be calls of functions."""
        return self.calls[0].tools is not None


def parse_chat(body: dict[str, Any], request_id: str) -> Generation:
    """Parse the body of /v1/chat/completions. Raises ApiError (400) naming the parameter at fault."""
    request = validate(ChatRequest, body)
    newer = request.max_completion_tokens
    if newer is not None and newer < 1:
        raise invalid("max_completion_tokens", f"must be an integer at least 1, got {newer}")
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs", "needs logprobs: true")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    base = GenerateCall(
        f"chatcmpl-{request_id}",
        conversation(request.messages),
        sampling(request, logprobs, _schema(request.response_format)),
        request.max_tokens if newer is None else newer,
        tools=tools(request),
        template_kwargs=request.chat_template_kwargs or {},
        place="messages",
    )
    return _generation(request, True, base, [base.prompt], MOST_TEXTS)


def in_session(generation: Generation, session: str | None) -> Generation:
    """Return the generation as a part of a session, whose requests one replica answers; None leaves it as it is."""
    if not session:
        return generation
    return replace(generation, calls=tuple(replace(call, session=session) for call in generation.calls))


def parse_completion(body: dict[str, Any], request_id: str, max_prompts: int = MOST_TEXTS) -> Generation:
    """Parse the body of /v1/completions: one text, several, one list of token ids, or several."""
    if body.get("logprobs") is False:
        body = {**body, "logprobs": None}
    request = validate(CompletionRequest, body)
    if request.best_of not in (None, request.n or 1):
        message = f"best_of = {request.best_of} is not supported by this server; leave it out"
        raise ApiError(400, message, code="unsupported_parameter", param="best_of")
    max_tokens = COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    prompts = _prompts(request.prompt)
    sampled = sampling(request, request.logprobs, _schema(request.response_format))
    base = GenerateCall(f"cmpl-{request_id}", prompts[0], sampled, max_tokens, bool(request.echo))
    return _generation(request, False, base, prompts, max_prompts)


def _prompts(prompt: Any) -> list[Prompt]:
    if prompt is None:
        return [""]  # OpenAI's default: the beginning of a document
    return [*texts(prompt, "prompt")]


def _generation(request: Request, chat: bool, base: GenerateCall, prompts: list[Prompt], most_texts: int) -> Generation:
    """Return the request's calls: `n` for each prompt. With a seed, each of the `n` has its own: seed, seed + 1, …"""
    n = request.n or 1
    if n * len(prompts) > most_texts:
        message = f"{len(prompts)} prompts with n = {n} in one request; at most {most_texts} texts are taken"
        raise ApiError(400, message, code="invalid_value", param="prompt" if len(prompts) > 1 else "n")
    _check_stream_options(request)
    base = replace(base, sampling={**base.sampling, **_beams(request)})
    check(base)
    seeds = [{} if request.seed is None else {"seed": request.seed + choice} for choice in range(n)]
    calls = tuple(
        replace(
            base,
            request_id=f"{base.request_id}-{at * n + choice}",
            prompt=prompt,
            place=base.place if len(prompts) == 1 else f"{base.place}[{at}]",
            sampling={**base.sampling, **seeds[choice]},
        )
        for at, prompt in enumerate(prompts)
        for choice in range(n)
    )
    options = request.stream_options
    return Generation(
        model=request.model,
        chat=chat,
        request_id=base.request_id,
        calls=calls,
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        n=n,
        continuous_usage=bool(options and options.continuous_usage_stats),
    )


def _beams(request: Request) -> dict[str, int]:
    """Return the width of a beam search, where one is asked for. Raises ApiError for what does not go with one."""
    beams = request.num_beams
    if beams is None:
        return {}
    if beams > 1 and request.stream:
        raise invalid("num_beams", "a beam search has its text only at the end: it needs stream: false")
    if beams > 1 and (request.n or 1) > 1:
        raise invalid("num_beams", "a beam search finds one text, the likeliest: leave `n` out")
    return {"num_beams": beams}


def _check_stream_options(request: Request) -> None:
    """Raise ApiError for options of a stream where none is asked for, as OpenAI does, and for padded chunks."""
    options = request.stream_options
    if options is None:
        return
    if options.include_obfuscation:
        message = "stream_options.include_obfuscation = true is not supported by this server; leave it out"
        raise ApiError(400, message, code="unsupported_parameter", param="stream_options.include_obfuscation")
    if not request.stream and (options.include_usage or options.continuous_usage_stats):
        raise invalid("stream_options", "is about streams; it needs stream: true")


def _schema(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    if wanted is None:
        return None
    if wanted.type != "json_schema" and wanted.json_schema is not None:
        raise invalid("response_format.json_schema", f'goes with the type "json_schema", not {shown(wanted.type)}')
    if wanted.type != "json_schema":
        return {"type": "object"} if wanted.type == "json_object" else None
    if wanted.json_schema is None:
        raise missing("response_format.json_schema")
    schemas.check(wanted.json_schema.schema_, "response_format.json_schema.schema")
    return wanted.json_schema.schema_
