"""Have a run save while there is time: when a node of its worker group is announced to be taken away.

Ray Core knows such announcements as draining nodes (from the autoscaler, KubeRay, or a cloud's notice of a spot
instance). The driver looks; the workers find the SAVE file at their next step. Ray Train's own watcher costs a process,
and its `get_preemption_info` a collective at every call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cluster import ray_internals
from jobs.run_folder import RunFolder

POLL_S = 2.0
LAST_CALL_S = 15.0
"""So long before the deadline, once more is saved."""


@dataclass
class Notices:
    """Which announcements have been answered. Pure: no clock, no cluster."""

    announced: set[str] = field(default_factory=set)
    last_calls: set[str] = field(default_factory=set)

    def due(self, draining: Mapping[str, int], nodes: tuple[str, ...], now_s: float) -> list[str]:
        """Return why to save now, one reason a node; nothing if there is none.

        Args:
            draining: node id → deadline in ms since the epoch; 0: none is known.
            nodes: those of the worker group.
            now_s: seconds since the epoch.
        """
        reasons = []
        for node in sorted(set(draining) & set(nodes)):
            left_s = draining[node] / 1000 - now_s
            if node not in self.announced:
                self.announced.add(node)
                when = f" in {left_s:.0f} s" if draining[node] else ""
                reasons.append(f"node {node[:8]} will be taken away{when}")
                if draining[node] and left_s < 2 * LAST_CALL_S:
                    self.last_calls.add(node)  # this save is the last call too
            elif draining[node] and left_s < LAST_CALL_S and node not in self.last_calls:
                self.last_calls.add(node)
                reasons.append(f"node {node[:8]} goes in {left_s:.0f} s")
        return reasons


def start(run: RunFolder, say: Callable[[str], None]) -> None:
    """Watch in the background, as long as this process lives."""
    threading.Thread(target=_watch, args=(run, say), name="tandem-preemption", daemon=True).start()


def _watch(run: RunFolder, say: Callable[[str], None]) -> None:
    notices = Notices()
    while True:
        attempt = run.attempt()
        try:
            draining = ray_internals.draining_nodes() if attempt else {}
        except Exception:  # whatever Ray raises while its GCS is away; there will be another look
            draining = {}
        reasons = notices.due(draining, attempt.nodes, time.time()) if attempt else []
        if reasons:
            run.request_save()
            say(f"{'; '.join(reasons)}: a checkpoint is written")
        time.sleep(POLL_S)
