"""The driver's end of the couriers that keep a run's folder on every node of its job (jobs/storage/courier.py)."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from jobs.storage.arrival import drivers
from jobs.storage.changes import Change, Copy, listed
from jobs.storage.courier import Bring, Courier, is_note, is_taken_back

HOLD_S = 1.0
"""So long a courier waits for something to tell before it answers that there is nothing."""
ROUND_S = 0.2
SETTLE_S = 30.0
TRIES = 3
"""So often a node's courier is started again, each time AGAIN_S after it was lost: Ray tells of a lost node by then."""
AGAIN_S = 2.0


class CourierLost(UserError):
    """What a living node has written did not all come to the driver."""

    exit_code = 1


@dataclass
class _Node:
    """What the driver knows of one node's courier."""

    actor: Any
    copy: Copy
    asked: Any = None
    """The answer that is waited for: whether the folder is shared, whether it has begun, what has changed."""
    stage: str = "asked"
    """`asked` whether it shares the folder, `begins`, `goes` between the two, `shares` or `failed`; one that was lost
    `waits` to be started again, then `returns`."""
    put: list[Any] = field(default_factory=list)
    told: list[Change] = field(default_factory=list)
    """What it was told last, which it may not have done."""
    lost: int = 0
    """How often it was."""
    at_s: float = 0.0
    """When it was lost last."""


class Couriers:
    """The driver's end: a thread that keeps the copies of the run's folder on all nodes as this one."""

    def __init__(
        self,
        folder: Path,
        wanted: Callable[[], dict[str, str]],
        bring: Sequence[Bring] = (),
        say: Callable[[str], object] = print,
    ) -> None:
        """Take the run's folder.

        Args:
            wanted: returns the nodes that need a copy now: id → address; this one may be among them.
            bring: what each of them needs besides.
            say: is told what does not work.
        """
        self._say = say
        self.token = secrets.token_hex(8)
        self._folder, self._wanted, self._bring = folder, wanted, tuple(bring)
        self._nodes: dict[str, _Node] = {}
        self._addresses: dict[str, str] = {}
        self.problems: dict[str, str] = {}
        """Why what a node has written has not all come, by its id."""
        self._complained = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tandem-couriers", daemon=True)
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin; this node's workers find their folder complete at once."""
        drivers(self._folder, self.token).touch()
        self._thread.start()

    def settle(self) -> None:
        """Return when all that nodes have written until now is here; what is not is among the problems."""
        with self._lock:
            for node_id, node in self._nodes.items():
                try:
                    self._return_now(node_id, node)
                    while node.stage == "goes" and (changes := self._last(node)):
                        node.copy.apply(changes, is_taken_back)
                except Exception as error:  # the node is lost, or its courier is
                    self._failed(node_id, node, error)

    def check(self) -> None:
        """Return if nothing of what nodes have written is missing here; those lost before the end are not asked.

        Raises:
            CourierLost: something may be.
        """
        if missing := [f"{self._addresses[node]}: {why}" for node, why in self.problems.items()]:
            raise CourierLost(
                f"what the job keeps on other nodes did not all come to the driver ({'; '.join(missing)}): submit the "
                "same spec again to go on from the newest checkpoint"
            )

    def stop(self) -> None:
        """End the couriers."""
        import ray

        self._ending.set()
        self._thread.join(HOLD_S + 5.0)
        for node in self._nodes.values():
            with suppress(Exception):
                ray.kill(node.actor)
        drivers(self._folder, self.token).unlink(missing_ok=True)

    def _last(self, node: _Node) -> list[Change]:
        """Return what a node has not told yet, or a part of it; each answer has SETTLE_S."""
        import ray

        asked = node.asked if node.asked is not None else node.actor.take.remote(0.0)
        node.asked = None
        found: list[Change] = ray.get(asked, timeout=SETTLE_S)
        return found or ray.get(node.actor.take.remote(0.0), timeout=SETTLE_S)

    def _run(self) -> None:
        while not self._ending.wait(ROUND_S):
            try:
                with self._lock:
                    self.round()
            except Exception as error:  # Ray, or this node's disk, for a moment: the next round does it
                if not self._complained:
                    self._complained = True
                    self._say(f"couriers of the run's folder: {type(error).__name__}: {error}; tried again")

    def round(self) -> None:
        """Start couriers on nodes that have come, forget those that have gone, and pass on what there is."""
        wanted = self._wanted()
        for node_id in wanted.keys() - self._nodes.keys():
            self._addresses[node_id] = wanted[node_id]
            self._nodes[node_id] = self._started(node_id)
        for node_id in self._nodes.keys() - wanted.keys():
            del self._nodes[node_id]
            self.problems.pop(node_id, None)  # it was lost, and its workers were: they begin again elsewhere
        found = listed(self._folder)
        for node_id, node in self._nodes.items():
            try:
                if node.stage == "waits" and time.monotonic() - node.at_s > AGAIN_S:
                    self._return(node_id, node)
                self._serve(node, found)
            except Exception as error:  # the node is lost, or its courier is; Ray tells of nodes
                self._failed(node_id, node, error)

    def _failed(self, node_id: str, node: _Node, error: Exception) -> None:
        cause = getattr(error, "cause", None) or error
        if node.stage in ("goes", "waits", "returns") and node.lost < TRIES and node_id in self._wanted():
            node.stage, node.lost, node.at_s, node.put = "waits", node.lost + 1, time.monotonic(), []
            self._say(f"the courier of the node {self._addresses[node_id]} is lost, and is started again")
        elif node.stage in ("goes", "waits", "returns"):  # else no worker has begun there
            node.stage = "failed"
            self.problems[node_id] = (str(cause).strip() or type(cause).__name__).splitlines()[-1]
            self._say(
                f"the courier of the node {self._addresses[node_id]} is lost ({self.problems[node_id]}): what workers "
                "write there from now on does not come here"
            )
        else:
            node.stage = "failed"
            self._say(f"a node has no copy of the run's folder, and takes no workers: {str(cause).strip()}")

    def _return(self, node_id: str, node: _Node) -> None:
        """Start a courier anew where one was lost."""
        node.actor = self._started(node_id).actor
        node.stage, node.asked = "returns", node.actor.again.remote(node.told)

    def _return_now(self, node_id: str, node: _Node) -> None:
        """Have a courier that was lost go on at once: the job has ended, and what its node has is wanted."""
        import ray

        if node.stage == "waits":
            self._return(node_id, node)
        if node.stage == "returns":
            ray.get(node.asked, timeout=SETTLE_S)
            node.stage, node.asked = "goes", None

    def _started(self, node_id: str) -> _Node:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        bound = NodeAffinitySchedulingStrategy(node_id, soft=False)
        remote = ray.remote(num_cpus=0, max_concurrency=3, scheduling_strategy=bound)(Courier)
        actor = remote.remote(str(self._folder), self.token, node_id)
        return _Node(actor, Copy(self._folder, is_note), actor.is_shared.remote())

    def _serve(self, node: _Node, found: Any) -> None:
        import ray

        if node.stage in ("shares", "failed", "waits"):
            return
        if node.stage == "goes":
            self._tell(node, found)
        if node.asked is None or not ray.wait([node.asked], timeout=0)[0]:
            return
        answer, node.asked = ray.get(node.asked), None
        if node.stage == "asked" and answer:
            node.stage = "shares"
            ray.kill(node.actor)
        elif node.stage == "asked":
            node.stage, node.asked = "begins", self._begun(node, found)
        else:
            if node.stage == "goes":
                node.copy.apply(answer, is_taken_back)
            node.stage, node.asked = "goes", node.actor.take.remote(HOLD_S)

    def _begun(self, node: _Node, found: Any) -> Any:
        return node.actor.begin.remote(node.copy.pending(found), self._bring, list(self._nodes))

    def _tell(self, node: _Node, found: Any) -> None:
        """Tell a node what has changed here, one message after the other."""
        import ray

        node.put = [put for put in node.put if not ray.wait([put], timeout=0)[0] or ray.get(put)]
        if not node.put:
            node.told = node.copy.pending(found)
            if node.told:
                node.put.append(node.actor.put.remote(node.told))
