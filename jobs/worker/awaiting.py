"""Wait for rows that are still encoded: as long as the preparation goes on, that is no hang."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from jobs import progress
from jobs.data import arrivals
from jobs.data.prepare import Prepared, rows_to_train_on
from jobs.data.rows import Rows
from jobs.worker.watchdog import Watchdog

LOOK_S = 1.0
"""What takes no longer is nothing special; else it is looked so often whether the preparation goes on."""

Found = TypeVar("Found")


def opened(prepared: Prepared, watchdog: Watchdog, say: bool) -> Rows:
    """Open the rows to train on, once the first are there; `say` that they are waited for.

    Raises:
        NoMore: none come.
    """
    if prepared.arriving is None:
        return rows_to_train_on(prepared)
    with ThreadPoolExecutor(1, thread_name_prefix="open") as pool:
        found = pool.submit(rows_to_train_on, prepared)
        return awaited(found, watchdog, arrivals.sign_of(prepared.arriving.files), "the first step" if say else "")


def awaited(found: Future[Found], watchdog: Watchdog, sign: Callable[[], object], who: str = "") -> Found:
    """Return what comes of reading rows that may have to come first.

    Args:
        sign: returns what changes as long as the preparation goes on.
        who: waits, for the log; "" where another rank says so.

    Raises:
        NoMore: they do not come.
    """
    if wait([found], timeout=LOOK_S).not_done and who:
        progress.say(f"{who} waits for rows that are still encoded")
    while not found.done():
        before = sign()
        with watchdog.during("data", learns=False):
            while wait([found], timeout=LOOK_S).not_done and sign() == before:
                pass
    return found.result()
