"""Ray Serve's controller answers before anything is deployed or stopped, and while it is: Ray waits for it for ever.

One that hangs is ended. Ray starts it again, and it takes over what runs. Requests do not need it meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.errors import UserError
from serve.deploy import ray_serve_internals

SILENT_S = 10.0
RESTART_S = 60.0
WATCH_EVERY_S = 5.0
WATCH_SILENT_S = 45.0
"""While something is deployed a controller is busier, and starts: importing takes seconds on a small machine."""


def ensure_answers(say: Callable[[str], None], silent_s: float = SILENT_S, restart_s: float = RESTART_S) -> None:
    """End a controller that does not answer, and wait for the one that Ray starts in its place.

    Args:
        say: told before it is ended.

    Raises:
        UserError: none answers after that either.
    """
    if ray_serve_internals.controller_answers(silent_s):
        return
    say(f"Ray Serve's controller has not answered for {silent_s:g} s: ended; Ray starts it again, replicas stay")
    ray_serve_internals.end_controller()
    deadline = time.monotonic() + restart_s
    while not ray_serve_internals.controller_answers(1.0):
        if time.monotonic() > deadline:
            raise UserError(
                f"Ray Serve's controller was ended, and none answers after {restart_s:g} s: start the cluster anew "
                "(`tandem cluster down`, `tandem cluster up`), then `tandem serve up SPEC`"
            )


@contextmanager
def watched(give_up: Callable[[str], None], every_s: float = WATCH_EVERY_S) -> Iterator[None]:
    """Call `give_up` from another thread, with a sentence, when the controller falls silent meanwhile."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every_s):
            if not ray_serve_internals.controller_answers(WATCH_SILENT_S) and not ended.is_set():
                give_up(f"Ray Serve's controller has not answered for {WATCH_SILENT_S:g} s: run the command again")
                return

    threading.Thread(target=watch, name="controller-watch", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
