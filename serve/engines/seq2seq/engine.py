"""Seq2SeqEngine: the Engine protocol over any transformers encoder-decoder for texts, embedded in the process.

    engine = Seq2SeqEngine(model, tokenizer, start, options)
    await engine.start()
    async for delta in engine.generate(GenerationRequest("1", source_ids, SamplingParams(temperature=0))):
        print(delta.text, end="")

A request's prompt is the source, read whole by the encoder; the answer's tokens are those of the decoder alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass
from typing import Any

from serve.engines.protocol import Delta, GenerationRequest, RequestError, SamplingParams
from serve.engines.seq2seq.beams import Beams
from serve.engines.seq2seq.check import goes_together
from serve.engines.seq2seq.decoder import Decoder
from serve.engines.seq2seq.loop import StepLoop
from serve.engines.seq2seq.sequence import Sequence
from serve.engines.step_thread import SteppingEngine
from serve.engines.text import Decoder as TextDecoder
from serve.engines.torch.completion import events, is_end
from serve.engines.torch.sampler import RequestSampler
from serve.engines.torch.sequence_text import SequenceText

NOT_HONOURED = {
    "logprobs": "this model's engine tells no log-probabilities",
    "prompt_logprobs": "this model's engine tells no log-probabilities, and a source is no beginning of its answer",
    "json_schema": "this model's engine follows no schema",
    "grammar": "this model's engine calls no functions",
    "visible_tokens": "this model's engine calls no functions",
}
"""Fields of SamplingParams that would change the answer, and why they cannot."""
NAMES = {"json_schema": "response_format", "grammar": "tools", "visible_tokens": "tools", "prompt_logprobs": "echo"}
"""What requests call them, where it is otherwise."""
WITHOUT_BEAMS = ("temperature", "presence_penalty", "frequency_penalty", "repetition_penalty", "stop", "ignore_eos",
                 "logit_bias", "min_tokens", "stop_token_ids")  # fmt: skip
"""What a beam search cannot honour; what only thins out a draw has no effect in one."""


@dataclass(frozen=True)
class Seq2SeqOptions:
    """What the engine may use, and how long texts are."""

    max_source: int
    """Tokens of the longest source."""
    max_target: int
    """Tokens of the longest answer."""
    max_batch: int = 16
    """Rows that decode at once: a beam search takes one for each beam. More requests wait in a queue."""
    threads: int = 1
    """CPU threads of a step."""


class Seq2SeqEngine(SteppingEngine[Sequence]):
    """Continuous batching of decoder steps. Takes the model over: do not use it for anything else.

    `start` raises UnsupportedModel for a model that it cannot step.
    """

    _steps: StepLoop

    def __init__(self, model: Any, tokenizer: Any, start: int, ends: Collection[int], options: Seq2SeqOptions) -> None:
        """Assign only; `start` does the work.

        Args:
            start: the token that the decoder begins with.
            ends: the tokens that end an answer.
        """
        self.tokenizer = tokenizer
        self.max_context = options.max_target
        self.max_source = options.max_source
        self._model, self._start, self._ends, self._options = model, start, frozenset(ends), options
        self._vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self._decode = TextDecoder(tokenizer)
        self._together = True
        self._steps = StepLoop(self._prepare, options.max_batch, options.threads)

    def report(self) -> dict[str, Any]:
        """Return what runs here: threads, dtype, lengths, and whether requests share steps."""
        return {
            "runner": "seq2seq",
            "threads": self._options.threads,
            "computes_in": str(self._model.dtype).removeprefix("torch."),
            "max_source": self.max_source,
            "max_target": self.max_context,
            "batches": self._together,
            "steps": self._steps.steps,
        }

    async def check(self, request: GenerationRequest) -> None:
        """Raise RequestError if the request can never be served."""
        prompt, params = request.prompt_token_ids, request.params
        if not 0 < len(prompt) <= self.max_source:
            raise RequestError("prompt", f"has {len(prompt)} tokens; this model reads 1 to {self.max_source}")
        for place, tokens in (
            ("prompt", prompt),
            ("generated", request.generated),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if wrong := [token for token in tokens if not 0 <= token < self._vocab_size]:
                raise RequestError(place, f"token id {wrong[0]} is outside 0..{self._vocab_size - 1}")
        check_params(params, self._options.max_batch)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Stream an answer; see the protocol. Of a beam search all comes at its end."""
        await self.check(request)
        sequence, text = self._sequence(request), SequenceText(request, self._decode)
        over = _resume(sequence, text) if request.generated else None
        if over is not None:
            for delta in text.deltas(over):
                yield delta
            return
        if request.stats is not None:
            request.stats.submit()
        self._steps.submit(sequence)
        try:
            async for event in events(sequence):
                for delta in text.deltas(event):
                    yield delta
                if text.ended:
                    return
        finally:
            self._steps.cancel(sequence)

    def resumes(self, request: GenerationRequest) -> bool:
        """See ResumingEngine: it can go on with what was chosen token by token."""
        return request.params.num_beams == 1 and len(request.generated) <= self.max_context

    def _prepare(self) -> tuple[Decoder, bool]:
        """Called in the engine's thread."""
        decoder = Decoder(self._model, self._start, self.tokenizer.pad_token_id)
        self._together = goes_together(decoder, self._vocab_size)
        return decoder, self._together

    def _sequence(self, request: GenerationRequest) -> Sequence:
        params, longest = request.params, min(request.params.max_tokens, self.max_context)
        ends = sorted(self._ends.union(params.stop_token_ids))
        sampler = RequestSampler(params, (), None, ends)  # penalties are for the answer's tokens, as in transformers
        beams = Beams(params.num_beams, longest, self._ends) if params.num_beams > 1 else None
        loop = asyncio.get_running_loop()
        return Sequence(request, longest, self._ends, sampler, loop, beams, list(request.generated))


def check_params(params: SamplingParams, max_batch: int) -> None:
    """Raise RequestError for what the engine cannot honour. Pure."""
    default = SamplingParams()
    for name, reason in NOT_HONOURED.items():
        if getattr(params, name) != getattr(default, name):
            raise RequestError(NAMES.get(name, name), reason)
    if params.num_beams == 1:
        return
    if params.num_beams > max_batch:
        raise RequestError(
            "num_beams", f"is {params.num_beams}; a replica of this model has room for {max_batch} beams"
        )
    for name in WITHOUT_BEAMS:
        if getattr(params, name) != (0 if name == "temperature" else getattr(default, name)):
            raise RequestError(name, "does not go with num_beams: a beam search looks for the likeliest answer")


def _resume(sequence: Sequence, text: SequenceText) -> Any:
    """Bring a new sequence and its text to where an engine is that has generated the request's `generated`.

    Returns:
        The event that ends the answer, where those tokens end it already.
    """
    from serve.engines.torch.completion import Chosen

    sequence.sampler.resume(sequence.request.generated)
    for token in sequence.request.generated:
        if not is_end(token, sequence.request.params, sequence.ends):
            text.repeat(token)
    reason = "stop" if text.stopped else sequence.finish_reason()
    return Chosen(None, reason, False, None, ()) if reason else None
