"""One `serve up` or `serve down` at a time on a cluster: two at once would take each other's models away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.errors import UserError
from serve.deploy.succession import NAMESPACE

NAME = "turn"
POLL_S = 0.5
OWNER_TIMEOUT_S = 5.0


class Turn:
    """An actor that only tells whose turn it is: its name is taken for as long as the job lives that has it."""

    def __init__(self, owner: str) -> None:
        self._owner = owner

    def owner(self) -> str:
        return self._owner


@contextmanager
def turn(timeout_s: float, say: Callable[[str], None], owner: str) -> Iterator[None]:
    """Wait until no other job deploys, and keep others waiting meanwhile.

    Args:
        say: told once that it waits, and for whom.
        owner: who this is, as others are told it.

    Raises:
        UserError: another one was at work all the time.
    """
    import ray

    deadline, waited = time.monotonic() + timeout_s, False
    while True:
        try:
            actor = ray.remote(Turn).options(name=NAME, namespace=NAMESPACE, num_cpus=0).remote(owner)
            break
        except ValueError:  # the name is taken
            if time.monotonic() > deadline:
                raise UserError(
                    f"another `serve up` or `serve down` ({_owner()}) has been at work for {timeout_s:g} s: wait for "
                    "its end, or stop it (`tandem jobs list` shows it, `tandem jobs stop JOB` ends it)"
                ) from None
        if not waited:
            say(f"waiting: another `serve up` or `serve down` ({_owner()}) is at work")
            waited = True
        time.sleep(POLL_S)
    try:
        yield
    finally:
        ray.kill(actor)


def _owner() -> str:
    """Return whose turn it is, as far as that one answers."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        owner: str = ray.get(ray.get_actor(NAME, namespace=NAMESPACE).owner.remote(), timeout=OWNER_TIMEOUT_S)
    except (ValueError, RayError, GetTimeoutError):
        return "its job does not answer"
    return owner
