"""Sequences whose rows decode together: what a step's logits mean for them, and which of them go on."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass

import torch

from serve.engines.protocol import EngineError
from serve.engines.seq2seq.rows import Rows, joined
from serve.engines.seq2seq.sequence import NOT_FINITE, Sequence
from serve.engines.torch.completion import Chosen
from serve.engines.torch.sampler import choose

Event = Chosen | EngineError
Said = list[tuple[Sequence, Event]]


@dataclass
class Group:
    """Sequences in the order of their rows, of which each has one, or one for each of its beams."""

    sequences: list[Sequence]
    rows: Rows


def told(sequence: Sequence, events: Iterable[Event]) -> Said:
    """Return what is to be said of a sequence; it is closed if it ended."""
    said: Said = []
    for event in events:
        said.append((sequence, event))
        if isinstance(event, Exception) or event.finish_reason is not None:
            sequence.closed = True
    return said


def advanced(sequences: ListOf[Sequence], rows: Rows, logits: torch.Tensor) -> tuple[Group, Said]:
    """Choose a token for each sequence, or go on with its beams.

    Args:
        rows: R rows, those of the sequences one after the other.
        logits: (R, V), of the tokens that follow.

    Returns:
        The sequences that go on, with their rows, and what is to be said.
    """
    starts, at = [], 0
    for sequence in sequences:
        starts.append(at)
        at += 1 if sequence.beams is None else len(sequence.beams.running)
    single = [(row, each) for row, each in zip(starts, sequences, strict=True) if each.beams is None]
    drawn = choose(logits[[row for row, _ in single]], [each.sampler for _, each in single]) if single else []
    tokens = iter(drawn)
    kept: list[int] = []
    said: Said = []
    for start, sequence in zip(starts, sequences, strict=True):
        came_from = [0]
        if sequence.beams is None:
            said += told(sequence, [sequence.chosen(next(tokens))])
        else:
            came_from, events = _searched(sequence, logits[start : start + len(sequence.beams.running)])
            said += events
        kept += [] if sequence.closed else [start + row for row in came_from]
    return Group([sequence for sequence in sequences if not sequence.closed], rows.taken(kept)), said


def _searched(sequence: Sequence, logits: torch.Tensor) -> tuple[list[int], Said]:
    """Go on with the beams of a sequence by the logits (R, V) of its rows; say where its next rows come from."""
    assert sequence.beams is not None
    if not torch.isfinite(logits).any(dim=-1).all() or torch.isnan(logits).any():
        return [], told(sequence, [EngineError(NOT_FINITE)])
    came_from = sequence.beams.advance(logits.float().cpu().numpy())
    return came_from, told(sequence, sequence.searched())


def without_closed(group: Group) -> Group:
    """Drop the rows of sequences that nobody listens to any more."""
    if not any(sequence.closed for sequence in group.sequences):
        return group
    kept: list[int] = []
    at = 0
    for sequence in group.sequences:
        count = len(sequence.next_tokens)
        kept += [] if sequence.closed else range(at, at + count)
        at += count
    return Group([each for each in group.sequences if not each.closed], group.rows.taken(kept))


def put_together(groups: list[Group]) -> list[Group]:
    """Make one group of several."""
    if len(groups) < 2:
        return groups
    sequences = [sequence for group in groups for sequence in group.sequences]
    return [Group(sequences, joined([group.rows for group in groups]))]
