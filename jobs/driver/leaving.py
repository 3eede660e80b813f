"""Have a group that runs on an excluded node saved, and started again without it (failures.straggler: exclude)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from jobs.driver.ray_train_internals import ResizeDecision
from jobs.run_folder import RunFolder

SAVE_TIMEOUT_S = 120.0


class Leaving:
    """Says when a group is to be started again because one of its nodes has been excluded meanwhile."""

    def __init__(self, run: RunFolder, newest: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        """Begin; `newest` returns the step of the newest checkpoint, `clock` seconds."""
        self._run, self._newest_now, self._clock = run, newest, clock
        self._asked_at: float | None = None
        self._newest = 0
        self._left = ""
        """The attempt that was ended for it last; the one behind it takes a while to note itself."""

    def is_due(self) -> bool:
        """Say so once a checkpoint is there that was asked for, or did not come in SAVE_TIMEOUT_S, until `leave`."""
        attempt = self._run.attempt()
        if attempt is None or not attempt.training or attempt.name == self._left:
            return False
        if not set(self._run.control().excluded) & set(attempt.nodes):
            return False
        newest = self._newest_now()
        if self._asked_at is None:
            self._asked_at, self._newest = self._clock(), newest
            self._run.request_save()
            return False
        return newest > self._newest or self._clock() - self._asked_at >= SAVE_TIMEOUT_S

    def leave(self) -> None:
        """Note that the group is started again for it."""
        attempt = self._run.attempt()
        self._asked_at, self._left = None, attempt.name if attempt else ""


class Leaves:
    """Goes before a scaling policy, outermost: has it decide as for a new group when the running one leaves."""

    leaving: Leaving | None = None
    """None: nothing excludes a node of a group that runs well."""

    def make_decision_for_running_worker_group(self, *arguments: Any, **keywords: Any) -> Any:
        """Return a decision to start the group again, or what the policy itself decides."""
        if self.leaving is not None and self.leaving.is_due():
            decision = self.make_decision_for_non_running_worker_group()  # type: ignore[attr-defined]
            if isinstance(decision, ResizeDecision):  # else the cluster does not answer: at the next look
                self.leaving.leave()
            return decision
        return super().make_decision_for_running_worker_group(*arguments, **keywords)  # type: ignore[misc]
