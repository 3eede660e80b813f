"""Named actors that outlive `serve up`, and how one that runs other code of Tandem is succeeded without a gap.

An actor keeps the code that it was started with. So each is told the digest of Tandem's code; where `up` finds another
one, it starts a successor under the second of two names, and

    successor.take_over(predecessor)  →  predecessor.hand_over(the successor's name)  →  what it knew

From then on the predecessor answers everything with `Moved`, until it is ended: nothing is decided twice, and nothing
is forgotten in between. Whoever finds the actor gone looks it up anew, under both names.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cluster
import serve

logger = logging.getLogger(__name__)
NAMESPACE = "tandem"
ANSWER_S = 10.0
"""So long a running actor may take to say of which code it is, and a successor to take over."""
START_S = 60.0
"""A process starts and imports, on a machine that may be busy."""
Say = Callable[[str], None]


class Moved(NamedTuple):
    """What an actor answers everything with, once another one knows what it knew."""

    to: str
    """The name of the other one."""


class Generation(NamedTuple):
    """What a running actor says of itself."""

    version: str
    """The digest of its code; empty for one that does not say."""
    moved: bool = False


class Steps(NamedTuple):
    """What `up` does about the actors that it finds."""

    keep: str | None
    """The name of the one that has the code wanted; None: one is to be started."""
    predecessor: str | None
    """The name of the one whose knowledge is taken over, and which is ended then."""
    end: tuple[str, ...]
    """Names of those that are ended before, for nobody needs them."""


def steps(found: Mapping[str, Generation], wanted: str) -> Steps:
    """Decide what to do about the running actors of one purpose, so that one of the code `wanted` is left. Pure.

    Args:
        found: by name. Two are there where an `up` ended in the middle of this.
    """
    here = {name: each for name, each in found.items() if not each.moved}
    keep = next((name for name, each in here.items() if each.version == wanted), None)
    others = [name for name in here if name != keep]
    end = [name for name in found if name not in here]
    if keep is None and len(others) == len(NAME_ENDS):  # a name must be free for the new one
        end.append(others.pop())
    return Steps(keep, others[0] if others else None, tuple(end))


NAME_ENDS = ("", "#2")


def names(base: str) -> list[str]:
    """Return the names that an actor may have."""
    return [f"{base}{end}" for end in NAME_ENDS]


@cache
def code_version() -> str:
    """Return a digest of the code that the actors may run: all of `serve`, and of `cluster` what it uses."""
    digest = hashlib.sha256()
    for package in (cluster, serve):
        for folder in map(Path, package.__path__):
            for path in sorted(folder.rglob("*.py")):
                digest.update(f"{package.__name__}/{path.relative_to(folder).as_posix()}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def ensure(base: str, begin: Callable[[str, Any | None], Any], say: Say) -> Any:
    """Return the actor called `base` that runs this process's code, started or there before.

    Args:
        begin: starts one under a name, and is given the one that it succeeds.
        say: told what was replaced, and what became of what it knew.
    """
    import ray

    running = {name: actor for name in names(base) if (actor := named(name)) is not None}
    step = steps({name: _generation(actor) for name, actor in running.items()}, code_version())
    for name in step.end:
        ray.kill(running[name])
    old = running.get(step.predecessor or "")
    if step.keep is not None:
        actor, name = running[step.keep], step.keep
    else:
        name = next(each for each in names(base) if each != step.predecessor)
        actor = begin(name, old)
    if old is not None:
        known = _taken_over(actor, old, name)
        ray.kill(old)
        say(f"{base} ran other code of Tandem: replaced, {'with what it knew' if known else 'and begins anew'}")
    return actor


def options(name: str, environment: dict[str, Any]) -> dict[str, Any]:
    """Return Ray's options of an actor that outlives its job and comes back after a failure."""
    return {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "max_restarts": -1,
        "runtime_env": environment,
    }


def find(base: str) -> Any | None:
    """Return the actor called `base`, whichever of its names it has; None: there is none."""
    return next((actor for name in names(base) if (actor := named(name)) is not None), None)


def named(name: str) -> Any | None:
    """Return the actor of exactly this name; None: there is none."""
    import ray

    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def stop(base: str) -> None:
    """End the actor called `base`, if there is one."""
    import ray

    for name in names(base):
        if (actor := named(name)) is not None:
            ray.kill(actor)


def _generation(actor: Any) -> Generation:
    import ray
    from ray.exceptions import RayError

    try:
        return Generation(*ray.get(actor.generation.remote(), timeout=ANSWER_S))
    except (AttributeError, RayError):  # of a Tandem that knew no successors; or it hangs, or has just died
        return Generation("")


def _taken_over(actor: Any, old: Any, name: str) -> bool:
    """Have an actor take over what the old one knows; tell whether it did."""
    import ray
    from ray.exceptions import RayError

    try:
        return bool(ray.get(actor.take_over.remote(old, name), timeout=START_S + ANSWER_S))
    except RayError:
        logger.exception("what the actor before knew is lost")
        return False
