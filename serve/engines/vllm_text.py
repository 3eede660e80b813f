"""vLLM's outputs → deltas. The text is made here, of the tokens: where a replica is lost, another one can come to the
same state of it, which vLLM's own detokenizer, with all that it holds back for stop strings, does not tell.
"""

from __future__ import annotations

from typing import Any

from serve.engines.protocol import Delta, EngineError, FinishReason, GenerationRequest, SamplingParams, TokenLogprobs
from serve.engines.text import Decoder, TextStream


class OutputText:
    """The text of one request."""

    def __init__(self, request: GenerationRequest, decode: Decoder) -> None:
        params = request.params
        before = request.prompt_token_ids if request.continues_prompt else ()
        self._request = request
        self._text = TextStream(decode.showing(params.visible_tokens), params.stop, params.min_tokens, before)
        self._tokens = 0
        self.ended = False
        """Whether the last delta was given."""

    def repeated(self) -> Delta:
        """Return what another engine has generated, as the first delta."""
        generated = self._request.generated
        piece, _ = self._push(generated[: len(generated) - self._at_end(generated)])
        return self._delta(generated, piece, None)

    def over(self, room: int) -> FinishReason | None:
        """Return why the text ends with what another engine has generated, if it does.

        Args:
            room: tokens that the context has beside the prompt.
        """
        if self._text.stopped or self._at_end(self._request.generated):
            return "stop"
        return "length" if self._tokens >= min(self._request.params.max_tokens, room) else None

    def last(self, reason: FinishReason) -> Delta:
        """Return the end of a text that has no more tokens."""
        return self._delta((), "" if self._text.stopped else self._text.flush(), reason)

    def delta(self, output: Any) -> Delta:
        """Return what one of vLLM's outputs adds. Raises EngineError when vLLM gave the request up."""
        told = output.outputs[0]
        if told.finish_reason not in (None, "stop", "length"):
            raise EngineError(f"vLLM gave the request up: {told.finish_reason}")
        prompt, params = self._request.prompt_token_ids, self._request.params
        scored = _logprobs(prompt, output.prompt_logprobs, params) if not self._request.generated else ()
        if params.max_tokens == 0:  # it was only scored; vLLM chooses at least one
            return self._delta((), "", "length" if told.finish_reason else None, prompt_logprobs=scored)
        tokens = tuple(told.token_ids)
        piece, read = self._push(tokens[: -1 if told.finish_reason == "stop" else None])
        if self._text.stopped:  # what was chosen after it is no part of the answer
            return self._delta(tokens[:read], piece, "stop", _logprobs(tokens[:read], told.logprobs, params), scored)
        if told.finish_reason is not None:
            piece += self._text.flush()
        reason: FinishReason | None = "stop" if self._text.stopped else told.finish_reason
        return self._delta(tokens, piece, reason, _logprobs(tokens, told.logprobs, params), scored)

    def _push(self, tokens: tuple[int, ...]) -> tuple[str, int]:
        """Add tokens that show; return their text, and how many there are up to one that completes a stop string."""
        text = ""
        for count, token in enumerate(tokens, 1):
            text += self._text.push(token)
            if self._text.stopped:
                return text, count
        return text, len(tokens)

    def _at_end(self, generated: tuple[int, ...]) -> bool:
        return generated[-1] in self._request.params.stop_token_ids

    def _delta(
        self,
        token_ids: tuple[int, ...],
        text: str,
        reason: FinishReason | None,
        logprobs: tuple[TokenLogprobs, ...] = (),
        prompt_logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> Delta:
        self._tokens += len(token_ids)
        self.ended = reason is not None
        prompt_tokens = len(self._request.prompt_token_ids)
        return Delta(text, token_ids, reason, prompt_tokens, self._tokens, logprobs, prompt_logprobs)


def _logprobs(tokens: Any, told: Any, params: SamplingParams) -> tuple[TokenLogprobs, ...]:
    entries = []
    for token, ranked in zip(tokens, told or (), strict=False):
        if ranked is None:  # the first token of a prompt
            entries.append(TokenLogprobs(token, None, ()))
            continue
        best = sorted(((one.rank, at, one.logprob) for at, one in ranked.items()))[: params.logprobs or 0]
        entries.append(TokenLogprobs(token, ranked[token].logprob, tuple((at, value) for _, at, value in best)))
    return tuple(entries)
