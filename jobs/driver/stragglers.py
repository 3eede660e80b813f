"""Find the nodes that hold a run up: their ranks work longer in each step than the others do, which wait for them.

Each rank tells now and then how long it works by itself (jobs/worker/pace.py). `Streaks` compares, and is pure; the
rest says what it finds, by name, and with `failures.straggler: exclude` has the group go on without the node
(jobs/driver/leaving.py).
"""

from __future__ import annotations

import statistics
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from cluster import placement, topology
from jobs import progress
from jobs.driver import postmortem
from jobs.driver.job import Job
from jobs.paces import Pace

POLL_S = 2.0
RATIO = 1.3
"""A node whose rank works so many times as long as the others is slow …"""
WINDOWS = 3
"""… once it has been so in so many windows in a row, and keeps up again after as many in which it was not."""
KEEPS_UP = 1.15
WORTH, WORTH_S = 0.1, 0.002
"""What costs less than this share of a step, or less than so much, is not worth a word: rank 0 does the writing."""
FEWEST_TO_EXCLUDE = 3
"""Of two, nothing says which one is as it should be."""


@dataclass(frozen=True)
class Straggler:
    """A slow node."""

    node: str
    ranks: tuple[int, ...]
    """The slow ones on it."""
    ratio: float
    """Own time of the slowest of them over that of the others."""
    step: int
    """Where it was noticed first, or, when it is over, where it kept up again."""
    outnumbered: bool = False
    """Most of at least FEWEST_TO_EXCLUDE nodes are faster: it is this one that is not as it should be."""
    over: bool = False


def slower(paces: Mapping[int, Pace], ratio: float) -> list[Straggler]:
    """Return the nodes with a rank that works more than `ratio` times as long as usual, the slowest first. Pure.

    What is usual is the lower median over the nodes, so that many ranks of a slow node are one voice; within one node
    it is that over the ranks. A rank with more rows than the others may take longer in proportion.
    """
    rows = statistics.median(pace.rows for pace in paces.values())
    own = {rank: pace.own_s / max(1.0, pace.rows / rows if rows else 1.0) for rank, pace in paces.items()}
    by_node: dict[str, list[int]] = {}
    for rank, pace in sorted(paces.items()):
        by_node.setdefault(pace.node, []).append(rank)
    voices = [statistics.median(own[rank] for rank in ranks) for ranks in by_node.values()]
    usual = statistics.median_low(voices if len(by_node) > 1 else own.values())
    worth = {rank: max(WORTH_S, WORTH * pace.step_s) for rank, pace in paces.items()}
    slow = {rank for rank in own if own[rank] > ratio * usual and own[rank] - usual > worth[rank]}
    nodes = {node: tuple(rank for rank in ranks if rank in slow) for node, ranks in by_node.items()}
    count = sum(bool(ranks) for ranks in nodes.values())
    outnumbered = len(by_node) >= FEWEST_TO_EXCLUDE and 2 * count < len(by_node)
    found = [
        Straggler(node, ranks, max(own[r] for r in ranks) / usual, paces[ranks[0]].step, outnumbered)
        for node, ranks in nodes.items()
        if ranks and usual > 0
    ]
    return sorted(found, key=lambda straggler: -straggler.ratio)


@dataclass
class Streaks:
    """For how many windows in a row nodes have been slow, or have kept up. Pure: no clock, no files."""

    attempt: str = ""
    windows: dict[int, int] = field(default_factory=dict)
    """The number of each rank's window that was compared last."""
    slow: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By node: windows in a row, and the step of the first."""
    calm: dict[str, int] = field(default_factory=dict)
    told: dict[str, Straggler] = field(default_factory=dict)

    def look(self, attempt: str, ranks: int, paces: Mapping[int, Pace]) -> list[Straggler]:
        """Return what is to be said now: of each node once that it is slow, and once that this is over.

        Args:
            attempt: the start of the group that the paces are of; after another one, windows are counted anew.
            ranks: how many there are; as long as one of them has told no new window, nothing is compared.
        """
        nodes = {pace.node for pace in paces.values()}
        if attempt != self.attempt:
            self.attempt, self.windows, self.slow, self.calm = attempt, {}, {}, {}
        if len(paces) < ranks or ranks < 2 or any(p.window <= self.windows.get(r, 0) for r, p in paces.items()):
            return []
        self.windows = {rank: pace.window for rank, pace in paces.items()}
        self.told = {node: straggler for node, straggler in self.told.items() if node in nodes}
        found = {straggler.node: straggler for straggler in slower(paces, RATIO)}
        self.slow = {node: self._longer(node, found[node].step) for node in found}
        news = []
        for node, straggler in found.items():
            count, since = self.slow[node]
            if count >= WINDOWS and node not in self.told:
                self.told[node] = replace(straggler, step=since)
                news.append(self.told[node])
        return news + self._over(paces)

    def _longer(self, node: str, step: int) -> tuple[int, int]:
        count, since = self.slow.get(node, (0, step))
        return count + 1, since

    def _over(self, paces: Mapping[int, Pace]) -> list[Straggler]:
        still = {straggler.node for straggler in slower(paces, KEEPS_UP)}
        self.calm = {node: self.calm.get(node, 0) + 1 for node in self.told if node not in still}
        step = max(pace.step for pace in paces.values())
        over = [node for node, count in self.calm.items() if count >= WINDOWS]
        return [replace(self.told.pop(node), step=step, over=True) for node in over]


def sentence(straggler: Straggler, name: str) -> str:
    """Say what was found. Pure."""
    if straggler.over:
        return f"node {name} keeps up with the others again, at step {straggler.step}"
    ranks = placement.amount(len(straggler.ranks), "rank") if len(straggler.ranks) > 4 else _numbers(straggler.ranks)
    return (
        f"node {name} is a straggler: {ranks} of it took {straggler.ratio:.1f} times as long for each step as the "
        f"others, without the waits for each other, since step {straggler.step}"
    )


def why_not(straggler: Straggler, *, has_room: bool) -> str | None:
    """Return why a straggler cannot be excluded; None: it can. Pure."""
    if not straggler.outnumbered:
        return "most of at least three nodes have to be faster for it to be certain which is wrong"
    return None if has_room else "the other nodes have no room for the fewest workers that the job runs with"


def start(job: Job) -> None:
    """Watch in the background, as long as this process lives."""
    threading.Thread(target=_watch, args=(job,), name="tandem-stragglers", daemon=True).start()


def _watch(job: Job) -> None:
    streaks = Streaks()
    while True:
        time.sleep(POLL_S)
        try:
            attempt = job.folder.attempt()
            if attempt is not None and attempt.training:
                for straggler in streaks.look(attempt.name, attempt.workers, job.folder.paces.of(attempt.name)):
                    _tell(job, straggler)
        except Exception:  # a look that fails costs the look: the run itself needs none of this
            traceback.print_exc()


def _tell(job: Job, straggler: Straggler) -> None:
    said = sentence(straggler, topology.name_of(straggler.node))
    if job.spec.failures.straggler == "exclude" and not straggler.over:
        said += _excluded(job, straggler)
    progress.say(said)
    with suppress(OSError):
        entry: dict[str, Any] = {"time": time.time(), "node": straggler.node, "step": straggler.step, "said": said}
        job.folder.paces.add_straggler({**entry, "over": straggler.over})
    page = postmortem.page(job.folder)
    job.track(lambda run: run.log_text(page, "post-mortem.md"))
    job.track(lambda run: run.set_tags({"tandem.straggler": said}))


def _excluded(job: Job, straggler: Straggler) -> str:
    """Exclude a node if that can be; return what to say of it."""
    control, wanted = job.folder.control(), job.spec.resources
    fewest = placement.Request(wanted.fewest, wanted.cpus_per_worker, wanted.gpus_per_worker)
    excluded = (*control.excluded, straggler.node)
    answer = placement.fit(fewest, [node for node in topology.own_nodes() if node.node_id not in excluded])
    has_room = isinstance(answer, placement.Placement) or answer.fits_when_free
    if reason := why_not(straggler, has_room=has_room):
        return f"; it is not excluded: {reason}"
    job.folder.write_control(replace(control, excluded=excluded))
    return "; it is excluded: the run saves, and goes on without it (failures.straggler)"


def _numbers(ranks: tuple[int, ...]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
