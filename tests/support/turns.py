"""Tests that are marked `alone` have the machine to themselves: the other processes of the same run wait meanwhile."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest


class Turns:
    """One process's place in a run of several; each has its own, over the same folder."""

    def __init__(self, folder: Path) -> None:
        self._door, self._room = (os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600) for name in ("door", "room"))
        self._alone = False

    def enter(self, alone: bool) -> None:
        """Wait until no test runs that must be alone, and for one that must be, until none runs at all."""
        if self._alone:
            return
        fcntl.flock(self._door, fcntl.LOCK_EX)  # else others would come in, one after the other, before who waits here
        fcntl.flock(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self._door, fcntl.LOCK_UN)
        self._alone = alone

    def leave(self, next_alone: bool) -> None:
        """Let others in, unless this was alone and what comes next is as well."""
        if self._alone and next_alone:
            return
        fcntl.flock(self._room, fcntl.LOCK_UN)
        self._alone = False


def of_run(config: pytest.Config) -> Turns | None:
    """Return the place of this process in its run; None where it is the only one."""
    if not hasattr(config, "workerinput"):
        return None
    return Turns(Path(config.option.basetemp).parent)  # of all processes of the run


def is_alone(item: pytest.Item | None) -> bool:
    """Say whether a test must be alone."""
    return item is not None and item.get_closest_marker("alone") is not None
