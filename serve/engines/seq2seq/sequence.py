"""What a request needs beside its rows: how its next token is chosen, who listens, and what becomes of its tokens."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from serve.engines.protocol import EngineError, FinishReason, GenerationRequest
from serve.engines.seq2seq.beams import Beams
from serve.engines.torch.completion import Chosen, is_end
from serve.engines.torch.sampler import RequestSampler

NOT_FINITE = "the model produced logits that are not finite"


@dataclass(eq=False)
class Sequence:
    """One answer that is being made. Its events are `Chosen`, or the error that ends it."""

    request: GenerationRequest
    longest: int
    """Tokens that it may have."""
    ends: frozenset[int]
    """Tokens that end it, unless it ignores them."""
    sampler: RequestSampler
    loop: asyncio.AbstractEventLoop
    beams: Beams | None = None
    """The search for the likeliest answer; None: its tokens are chosen one by one."""
    tokens: list[int] = field(default_factory=list)
    events: deque[Any] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False
    """The last event was sent or nobody listens any more."""

    @property
    def width(self) -> int:
        """Rows that it may take."""
        return 1 if self.beams is None else self.beams.width

    @property
    def next_tokens(self) -> list[int]:
        """The last token of each of its rows."""
        return [self.tokens[-1]] if self.beams is None else [each.tokens[-1] for each in self.beams.running]

    def chosen(self, token: int | None) -> Chosen | EngineError:
        """Take the token that follows, and return what is to be said of it."""
        if token is None:
            return EngineError(NOT_FINITE)
        self.tokens.append(token)
        shown = not is_end(token, self.request.params, self.ends)
        return Chosen(token, self.finish_reason(), shown, None, ())

    def finish_reason(self) -> FinishReason | None:
        """Return why the answer ends with its last token, if it does; stop strings are not looked at."""
        if self.tokens and is_end(self.tokens[-1], self.request.params, self.ends):
            return "stop"
        return "length" if len(self.tokens) >= self.longest else None

    def searched(self) -> list[Chosen]:
        """Return what is to be said of the whole answer, where the search for it is over; nothing before."""
        best = self.beams.best if self.beams is not None else None
        if best is None:
            return []
        *first, last = best.tokens
        self.tokens = list(best.tokens)
        reason: FinishReason = "stop" if best.ended else "length"
        return [
            *(Chosen(token, None, True, None, ()) for token in first),
            Chosen(last, reason, not best.ended, None, ()),
        ]
