"""The text of one sequence, from what is said of it; and how a sequence comes to where another engine left it."""

from __future__ import annotations

from collections.abc import Iterator

from serve.engines.protocol import Delta, GenerationRequest
from serve.engines.text import Decoder, TextStream
from serve.engines.torch.completion import Chosen, finish_reason, is_end
from serve.engines.torch.scheduler import Sequence


class SequenceText:
    """Whole characters, nothing of a stop string."""

    def __init__(self, request: GenerationRequest, decode: Decoder) -> None:
        params = request.params
        before = request.prompt_token_ids if request.continues_prompt else ()
        self._request = request
        self._text = TextStream(decode.showing(params.visible_tokens), params.stop, params.min_tokens, before)
        self._repeated = ""
        """The text of what another engine has generated."""
        self._repeats = bool(request.generated)
        """Whether that is still to be repeated."""
        self._tokens = len(request.generated)
        self.ended = False
        """Whether the last delta was given."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._text.stopped

    def repeat(self, token: int) -> None:
        """Add a token of those that another engine has generated, and that show."""
        if not self.stopped:
            self._repeated += self._text.push(token)

    def deltas(self, event: Chosen) -> Iterator[Delta]:
        """Give what an event adds; before the first one, all that another engine has generated."""
        request = self._request
        prompt, given = len(request.prompt_token_ids), event.given_logprobs
        if self._repeats:
            self._repeats = False
            yield Delta(self._repeated, request.generated, None, prompt, self._tokens, logprobs=given[prompt:])
        piece = self._text.push(event.token) if event.token is not None and event.shown else ""
        if event.finish_reason is not None and not self.stopped:
            piece += self._text.flush()
        reason = "stop" if self.stopped else event.finish_reason
        self.ended = reason is not None
        self._tokens += event.token is not None
        yield Delta(
            text=piece,
            token_ids=() if event.token is None else (event.token,),
            finish_reason=reason,
            prompt_tokens=prompt,
            completion_tokens=self._tokens,
            logprobs=() if event.logprobs is None else (event.logprobs,),
            prompt_logprobs=() if request.generated else given,
        )


def resume(sequence: Sequence, text: SequenceText, eos: frozenset[int]) -> None:
    """Bring a new sequence and its text to where an engine is that has generated the request's `generated`.

    Where those tokens end the text already, it is marked as over: its first event will say so.
    """
    request, completion = sequence.request, sequence.context
    completion.sampler.resume(request.generated)
    for token in request.generated:
        if not is_end(token, request.params, eos):
            text.repeat(token)
    completion.over = "stop" if text.stopped else finish_reason(sequence, eos)
