"""One `serve up` or `serve down` at a time on a cluster: two at once would take each other's models away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.errors import UserError
from serve.deploy.state_actor import NAMESPACE

NAME = "turn"
POLL_S = 0.5


class Turn:
    """An actor that does nothing: its name is taken for as long as the job lives that has it."""


@contextmanager
def turn(timeout_s: float, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other job deploys, and keep others waiting meanwhile.

    Args:
        say: told once that it waits.

    Raises:
        UserError: another one was at work all the time.
    """
    import ray

    deadline, waited = time.monotonic() + timeout_s, False
    while True:
        try:
            actor = ray.remote(Turn).options(name=NAME, namespace=NAMESPACE, num_cpus=0).remote()
            break
        except ValueError:  # the name is taken
            if time.monotonic() > deadline:
                raise UserError(
                    f"another `serve up` or `serve down` has been at work for {timeout_s:g} s: wait for its end, or "
                    "stop it (`tandem jobs list` shows it, `tandem jobs stop JOB` ends it)"
                ) from None
        if not waited:
            say("waiting: another `serve up` or `serve down` is at work")
            waited = True
        time.sleep(POLL_S)
    try:
        yield
    finally:
        ray.kill(actor)
