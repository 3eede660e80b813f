"""A generated text on its way out of a replica: calls of functions taken out of it, log-probabilities beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve.engines.prompts import is_chat
from serve.engines.protocol import Delta, GenerationRequest
from serve.engines.spans import Placed, Scores, of_prompt, scored
from serve.engines.text import Decoder
from serve.engines.tools.parser import CallParser, TextPiece
from serve.wire import CallPiece, Chunk, FinishReason, GenerateCall, ScoredToken


@dataclass(frozen=True)
class _Part:
    """What a delta gave: text with its places, calls, and how much of the text so far is settled."""

    text: str
    returned: list[tuple[int, int]]
    calls: tuple[CallPiece, ...]
    settled: int


class AnswerText:
    """Deltas of an engine in, chunks out; the prompt comes first where it is wanted (`echo`)."""

    def __init__(
        self,
        call: GenerateCall,
        request: GenerationRequest,
        decode: Decoder,
        tokenizer: Any,
        parser: CallParser | None,
    ) -> None:
        """`parser` takes calls out of the text; None where the model has no functions to call."""
        self._parser = parser
        self._chat = is_chat(call)
        self._decode = decode.showing(request.params.visible_tokens)
        self._read = 0
        self._prompt: list[Placed] = []
        self._prefix = ""
        if call.echo:
            text = call.prompt if isinstance(call.prompt, str) else None
            self._prefix, self._prompt = of_prompt(decode, tokenizer, text, request.prompt_token_ids)
        before = request.prompt_token_ids if request.continues_prompt else ()
        wanted = request.params.logprobs is not None
        self._scores = Scores(self._decode, len(self._prefix), before) if wanted else None

    @property
    def ended(self) -> bool:
        """Whether nothing that the engine may still say belongs to the answer."""
        return self._parser is not None and self._parser.ended

    def chunk(self, delta: Delta) -> Chunk:
        """Return what a delta adds to the answer."""
        part = self._part(delta)
        reason = self._reason(delta)
        tokens = self._scored(delta, part, reason is not None)
        prefix, self._prefix = self._prefix, ""
        text = prefix + part.text
        return Chunk(text, delta.completion_tokens, reason, tuple(tokens), part.calls, delta.token_ids)

    def _part(self, delta: Delta) -> _Part:
        start, self._read = self._read, self._read + len(delta.text)
        if self._parser is None:
            return _Part(delta.text, [(start, self._read)] if delta.text else [], (), self._read)
        pieces = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            pieces += self._parser.finish()
        texts = [piece for piece in pieces if isinstance(piece, TextPiece)]
        return _Part(
            "".join(piece.text for piece in texts),
            [(piece.start, piece.start + len(piece.text)) for piece in texts],
            tuple(piece for piece in pieces if isinstance(piece, CallPiece)),
            self._parser.settled,
        )

    def _reason(self, delta: Delta) -> FinishReason | None:
        """Return why the answer ends: with calls, where it has complete ones and the model ended it."""
        if self._parser is None:
            return delta.finish_reason
        if self.ended:
            return "tool_calls"
        called = self._parser.calls > 0 and self._parser.calls == self._parser.complete
        return "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason

    def _scored(self, delta: Delta, part: _Part, last: bool) -> list[ScoredToken]:
        if self._scores is None:
            return []
        prompt, self._prompt = self._prompt, []
        told = [
            scored(entry, place, 0, self._decode)
            for entry, place in zip(delta.prompt_logprobs, prompt if delta.prompt_logprobs else (), strict=False)
        ]
        told += self._scores.push(delta.logprobs, part.returned, part.settled)
        if last:
            told += self._scores.finish()
        # a conversation's content has no token that does not show; a completion's has its end
        return [token for token in told if token.raw or not self._chat]
