"""Have a group that runs on an excluded node saved, and started again without it (failures.straggler: exclude)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

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
        """Say so once a checkpoint is there that was asked for, or did not come in SAVE_TIMEOUT_S."""
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
        if newest <= self._newest and self._clock() - self._asked_at < SAVE_TIMEOUT_S:
            return False
        self._asked_at, self._left = None, attempt.name
        return True


class Leaves:
    """Goes before one of Ray Train's scaling policies: has it decide as for a new group when the running one leaves."""

    leaving: Leaving | None = None
    """None: nothing excludes a node of a group that runs well."""

    def make_decision_for_running_worker_group(self, *arguments: Any, **keywords: Any) -> Any:
        """Return a decision to start the group again, or what the policy itself decides."""
        if self.leaving is not None and self.leaving.is_due():
            return self.make_decision_for_non_running_worker_group()  # type: ignore[attr-defined]
        return super().make_decision_for_running_worker_group(*arguments, **keywords)  # type: ignore[misc]
