"""Whether a node whose raylet has ended is started again, and when. Pure: no clock, no processes."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Action = Literal["watch", "wait", "start", "end"]

ASKED = (0, -signal.SIGTERM, 128 + signal.SIGTERM)
"""How a raylet ends that was asked to, by `ray stop` or by the autoscaler."""
GAVE_UP = (1, -signal.SIGABRT)
"""How one ends that hears it was declared dead: with 1, as seen on a host whose link was cut and mended (Ray 2.60)."""
GIVEN_UP = "its raylet was declared dead while its link was cut, and is ended"
RETURNS_LABEL = "tandem-returns"
"""The label of a node that has joined again after its death: how often."""
FIRST_PAUSE_S = 4.0
"""By then Ray knows that the old raylet is dead: it would place work on both."""
LONGEST_PAUSE_S = 60.0
SETTLED_S = 60.0
"""A raylet that has lived so long was started well; the next death is the first one again."""
MOST_TRIES = 10
SILENCE_S = 24 * 3600.0
"""A head that has not answered for so long is not coming back."""


@dataclass(frozen=True)
class Seen:
    """What a supervisor sees when it looks."""

    runs: bool
    """The raylet lives."""
    exit_code: int | None = None
    """Of the last raylet, negative for a signal; None where it is not known."""
    head_answers: bool = False
    tries: int = 0
    """Starts in a row that failed or whose raylet did not live for SETTLED_S."""
    idle_s: float = 0.0
    """Since the raylet ended, or since the last start failed."""
    silent_s: float = 0.0
    """For how long the head has not answered."""
    wanted: bool = True
    """The cluster is still the one that the node is of."""
    given_up: bool = False
    """The head has said itself that it takes the old raylet for dead."""


@dataclass(frozen=True)
class Next:
    """What a supervisor does, and why."""

    action: Action
    reason: str = ""


def decide(seen: Seen) -> Next:
    """Choose what to do."""
    if not seen.wanted:
        return Next("end", "its cluster was ended")
    if seen.runs:
        return Next("watch")
    if seen.exit_code in ASKED:
        return Next("end", "its raylet was asked to stop")
    if not seen.head_answers:
        if seen.silent_s > SILENCE_S:
            return Next("end", f"the head has not answered for {seen.silent_s / 3600:.0f} hours")
        return Next("wait", "the head does not answer")
    if seen.tries >= MOST_TRIES:
        return Next("end", f"{seen.tries} starts in a row went wrong")
    pause = 0.0 if seen.given_up and not seen.tries else pause_s(seen.tries)
    return (
        Next("start") if seen.idle_s >= pause else Next("wait", f"start {seen.tries + 1} follows after {pause:.0f} s")
    )


def pause_s(tries: int) -> float:
    """Return how long to wait before the next start, in seconds."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**tries)


def ended_how(exit_code: int | None) -> str:
    """Return a raylet's end in words."""
    if exit_code is None:
        return "its raylet is gone"
    if exit_code in GAVE_UP:
        return f"its raylet gave up (exit code {exit_code}): it was declared dead, or has lost the head"
    if exit_code < 0:
        return f"its raylet was ended by {signal.Signals(-exit_code).name}"
    return f"its raylet ended with code {exit_code}"


def node_id(command: Sequence[str]) -> str:
    """Return the node's id, in hexadecimal, that a raylet's command line has; empty: none."""
    return next((part.partition("=")[2] for part in command if part.startswith("--node_id=")), "")


def with_label(command: Sequence[str], name: str, value: int) -> list[str]:
    """Return a `ray start` that labels its node besides; one that has labels of its own stays as it is."""
    labelled = any(part.split("=")[0] in ("--labels", "--labels-file") for part in command)
    return [*command] if labelled else [*command, f"--labels={name}={value}"]
