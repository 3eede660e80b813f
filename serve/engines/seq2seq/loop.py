"""The thread that steps: it owns the model and every sequence's rows (serve/engines/step_thread.py).

take the inbox (sleep when there is nothing to do)
read the sources of sequences for which there are rows; one step of all rows that are there
choose a token for each sequence, or go on with its beams; close those that end, and drop their rows
put the new rows to the others
send what was chosen
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

from serve.engines.protocol import EngineLoad
from serve.engines.seq2seq.decoder import Decoder
from serve.engines.seq2seq.group import Event, Group, advanced, put_together, told, without_closed
from serve.engines.seq2seq.rows import Rows
from serve.engines.seq2seq.sequence import Sequence
from serve.engines.step_thread import StepThread, hand_over


class StepLoop(StepThread[Sequence]):
    """Run steps in a thread of its own, from `start` to `stop`."""

    name = "tandem-seq2seq"

    def __init__(self, prepare: Callable[[], tuple[Decoder, bool]], max_rows: int, threads: int) -> None:
        """`prepare` is called in the thread: the decoder, and whether rows of several sequences go together."""
        super().__init__(threads)
        self._prepare = prepare
        self._max_rows = max_rows
        self._decoder: Decoder | None = None
        self._together = True
        self._groups: list[Group] = []
        self._waiting: deque[Sequence] = deque()
        self._stepping: list[Sequence] = []
        """The sequences of the step that is under way, those that begin with it among them."""
        self._outbox: list[tuple[Sequence, Event]] = []
        self.steps = 0
        """How many there have been."""

    def load(self) -> EngineLoad:
        """Return how busy it is; the cache's room is that of its rows, in tokens of both sides."""
        arriving = self._arriving()
        groups = list(self._groups)
        return EngineLoad(
            running=sum(len(group.sequences) for group in groups),
            waiting=len(self._waiting) + arriving,
            cache_tokens_used=sum(sum(group.rows.lengths) + sum(group.rows.sources) for group in groups),
            cache_tokens_total=0,
            tokens_per_second=self._rate.per_second(),
        )

    # ---- the thread ----

    def _make_ready(self) -> None:
        self._decoder, self._together = self._prepare()

    def _advance(self) -> None:
        self._stepping = self._running()
        admitted = self._admitted()
        self._stepping += admitted
        new = self._begun(admitted)
        self._groups = [stepped for group in self._groups if (stepped := self._stepped(group)).sequences]
        groups = [*self._groups, *(group for group in new if group.sequences)]
        self._groups = put_together(groups) if self._together else groups

    def _after(self, began: float) -> None:
        self.steps += 1
        ended = time.perf_counter()
        for sequence in self._stepping:
            if sequence.request.stats is not None:
                answered = sequence.beams is None or sequence.closed
                sequence.request.stats.ran(began, ended, answered=answered)
        self._stepping = []

    def _forget(self) -> None:
        self._groups = []

    def _admitted(self) -> list[Sequence]:
        """Take sequences out of the queue while there are rows for them, in their order."""
        used, admitted = sum(sequence.width for sequence in self._running()), []
        while self._waiting and used + self._waiting[0].width <= self._max_rows:
            sequence = self._waiting.popleft()
            used += sequence.width
            admitted.append(sequence)
        return admitted

    def _begun(self, sequences: list[Sequence]) -> list[Group]:
        """Read sources, those of fresh sequences together, and choose the first token of each."""
        assert self._decoder is not None
        fresh = [sequence for sequence in sequences if not sequence.tokens]
        parts = [fresh] if self._together and fresh else [[sequence] for sequence in fresh]
        groups = []
        for part in [*parts, *([sequence] for sequence in sequences if sequence.tokens)]:
            sources = [sequence.request.prompt_token_ids for sequence in part]
            rows, logits = self._decoder.begin(sources, part[0].tokens)
            groups.append(self._advanced(part, rows, logits))
        return groups

    def _advanced(self, sequences: list[Sequence], rows: Rows, logits: torch.Tensor) -> Group:
        """Say what the logits (R, V) mean for each sequence; return those that go on, with their rows."""
        group, said = advanced(sequences, rows, logits)
        self._outbox += said
        self._rate.add(len(sequences))
        return group

    def _stepped(self, group: Group) -> Group:
        """Go one token on with a group."""
        assert self._decoder is not None
        group = without_closed(group)
        if not group.sequences:
            return group
        tokens = [token for sequence in group.sequences for token in sequence.next_tokens]
        rows, logits = self._decoder.step(group.rows, tokens)
        return self._advanced(group.sequences, rows, logits)

    # ---- sequences ----

    def _is_closed(self, sequence: Sequence) -> bool:
        return sequence.closed

    def _add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def _close(self, sequence: Sequence) -> None:
        sequence.closed = True
        if sequence in self._waiting:
            self._waiting.remove(sequence)

    def _running(self) -> list[Sequence]:
        return [each for group in self._groups for each in group.sequences if not each.closed]

    def _in_step(self) -> list[Sequence]:
        return self._stepping

    def _busy(self) -> bool:
        return bool(self._groups or self._waiting)

    def _held(self) -> list[Sequence]:
        return [*self._running(), *self._waiting]

    def _say(self, sequence: Sequence, event: Event) -> None:
        self._outbox += told(sequence, [event])
        if sequence.closed:
            self._close(sequence)

    def _send(self) -> None:
        said, self._outbox = self._outbox, []
        for sequence in hand_over(said):
            sequence.closed = True
