"""The processes of this test's own cluster, and of no other on the machine: other tests run beside it."""

from __future__ import annotations

from contextlib import suppress

import psutil

from cluster import processes, record


def members() -> list[psutil.Process]:
    """List the live processes of the cluster in Tandem's home."""
    started = record.read()
    assert started is not None, "a cluster was started in this home"
    return processes.members(started.id, started.sessions, started.started_at, started.boot)


def named(*beginnings: str) -> list[psutil.Process]:
    """List the cluster's processes whose names begin so."""
    found = []
    for process in members():
        with suppress(psutil.Error):
            if process.name().startswith(beginnings):
                found.append(process)
    return found


def running(*words: str) -> list[psutil.Process]:
    """List the cluster's processes that have all these words in their command lines."""
    found = []
    for process in members():
        with suppress(psutil.Error):
            if {*words} <= {*process.cmdline()}:
                found.append(process)
    return found


def stopped() -> list[psutil.Process]:
    """List the cluster's workers that a signal has stopped."""
    found = []
    for process in named("ray::"):
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_STOPPED:
                found.append(process)
    return found
