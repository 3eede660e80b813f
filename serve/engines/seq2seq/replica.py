"""A replica of a model that makes one text of another: which text of a request that is, and predictions."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from serve.engines import inputs as sent
from serve.engines import stats
from serve.engines.answer_text import AnswerText
from serve.engines.prompts import TooLong, check_length
from serve.engines.protocol import EngineError, GenerationRequest, RequestError, SamplingParams
from serve.engines.replica import CODES, ROWS_AT_ONCE, GenerativeReplica, failed
from serve.engines.seq2seq.engine import Seq2SeqEngine
from serve.wire import GenerateCall, Identity, InferCall, Inferred, Refused

SAID = frozenset({"role", "content"})


class TranslatingReplica(GenerativeReplica):
    """Serves a Seq2SeqEngine."""

    def __init__(
        self,
        engine: Seq2SeqEngine,
        identity: Identity,
        defaults: Mapping[str, Any],
        prefix: str,
        inputs: list[dict[str, Any]],
        outputs: list[dict[str, Any]],
    ) -> None:
        """`prefix` stands before each source; `inputs` and `outputs` are those of predictions."""
        super().__init__(engine, identity, defaults)
        self._translator = engine
        self._prefix = prefix
        self._tensors = {"inputs": inputs, "outputs": outputs}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **self._tensors}

    async def infer(self, call: InferCall) -> Inferred | Refused:
        """Translate every row of the inputs, greedily unless the model's generation config says otherwise."""
        try:
            texts = [_decoded(each) for each in sent.rows(call.inputs, self._tensors["inputs"])]
            answers: list[str] = []
            for start in range(0, len(texts), ROWS_AT_ONCE):
                some = enumerate(texts[start : start + ROWS_AT_ONCE], start)
                rows = (self._row(call.request_id, at, len(texts), text) for at, text in some)
                answers += await asyncio.gather(*rows)
            return Inferred(self._identity, [{"text": answer} for answer in answers])
        except ValueError as error:  # InputError and RequestError are among them
            return Refused(400, str(error), _code(error), "inputs")
        except EngineError as error:
            return failed(call, error)

    async def _row(self, request_id: str, at: int, count: int, text: str) -> str:
        try:
            call = GenerateCall(f"{request_id}-{at}", text, place="text")
            request, _ = await asyncio.to_thread(self._prepared, call)
            async with aclosing(self._translator.generate(request)) as deltas:
                return "".join([delta.text async for delta in deltas])
        except RequestError as error:
            if count == 1:
                raise
            raise type(error)(error.field, f"row {at}: {str(error).partition(': ')[2]}") from error

    def _prepared(self, call: GenerateCall) -> tuple[GenerationRequest, AnswerText]:
        """Return what the engine is asked, and what its answer will be put into. Raises RequestError."""
        engine = self._translator
        ids = self._source(call)
        wanted = {"prompt_logprobs": True} if call.echo else {}
        longest = engine.max_context if call.max_tokens is None else call.max_tokens
        params = SamplingParams(**{**self._defaults, **call.sampling, **wanted, "max_tokens": longest})
        request = GenerationRequest(call.request_id, ids, params, False, call.generated, stats.current())
        return request, AnswerText(call, request, self._decoder, engine.tokenizer, None)

    def _source(self, call: GenerateCall) -> tuple[int, ...]:
        engine = self._translator
        source = source_of(call)
        if not isinstance(source, str):
            ids = source
        else:
            check_length(engine.tokenizer, self._prefix + source, engine.max_source, call.place)
            ids = tuple(engine.tokenizer(self._prefix + source, verbose=False)["input_ids"])
        if len(ids) > engine.max_source:
            message = f"this model reads {engine.max_source} tokens and the text has {len(ids)}: shorten it"
            raise TooLong(call.place, message)
        return ids


def source_of(call: GenerateCall) -> str | tuple[int, ...]:
    """Return the text, or the tokens, that a call wants translated: the one message of the user's. Pure.

    Raises:
        RequestError: there is more to the conversation, or nothing to translate.
    """
    if call.tools is not None:
        raise RequestError("tools", "this model calls no functions")
    if call.template_kwargs:
        raise RequestError("chat_template_kwargs", "this model has no chat template")
    prompt = call.prompt
    if not isinstance(prompt, str) and isinstance(prompt[0], int):
        return prompt  # type: ignore[return-value]
    text = prompt if isinstance(prompt, str) else _only_message(prompt)  # type: ignore[arg-type]
    if not text.strip():
        raise RequestError(call.place, "there is no text to translate")
    return text


def _only_message(messages: tuple[dict[str, Any], ...]) -> str:
    last = len(messages) - 1
    for at, message in enumerate(messages):
        if at < last or message["role"] != "user":
            raise RequestError(
                f"messages[{at}]",
                f"this model reads one message of the role user and nothing else; this one is of the role "
                f"{message['role']}: leave it out",
            )
        for name in message.keys() - SAID:
            raise RequestError(f"messages[{at}].{name}", "this model reads the message's text alone")
    return str(messages[last]["content"])


def _code(error: ValueError) -> str:
    return CODES.get(type(error), "invalid_value") if isinstance(error, RequestError) else "invalid_value"


def _decoded(text: Any) -> str:
    try:
        return str(text.decode("utf-8") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise ValueError(f"the text is not UTF-8: {error}") from error
