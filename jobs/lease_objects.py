"""The objects by which contenders for a run agree (jobs/lease_contest.py): their names, what they say, who is first."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jobs.lease import UNKNOWN, Owner

_NAME = re.compile(r"^(?:(choosing)|(claim|held)-(\d{8,}))-([0-9a-f]+)(?:\.json)?$")


@dataclass(frozen=True)
class Name:
    """What the name of an object says."""

    kind: Literal["choosing", "claim", "held"]
    number: int
    """0 for a mark."""
    id: str

    def __str__(self) -> str:
        number = "" if self.kind == "choosing" else f"-{self.number:08d}"
        return f"{self.kind}{number}-{self.id}{'' if self.kind == 'held' else '.json'}"

    @property
    def rank(self) -> tuple[int, str]:
        """The lowest wins."""
        return self.number, self.id


def content(owner: Owner, beats: int) -> bytes:
    """Return what a claim says. Pure.

    All of one claim are of one size: a client asks for an object's size before it asks for the object, which may have
    been written anew in between.
    """
    room = len(json.dumps({**asdict(owner), "released": False, "beats": 10**12}))
    return json.dumps({**asdict(owner), "beats": beats}).ljust(room).encode()


def owner_of(found: bytes | None) -> Owner:
    """Return whose a claim or a mark is. Pure."""
    try:
        values = json.loads(found or b"")
        return Owner(**{key: value for key, value in values.items() if key != "beats"})
    except (ValueError, TypeError, AttributeError):
        return UNKNOWN


def parsed(names: Iterable[str]) -> list[Name]:
    """Return what the names of a folder say; others' are left out. Pure."""
    matches = filter(None, map(_NAME.match, names))
    return [Name(m[1] or m[2], int(m[3] or 0), m[4]) for m in matches]  # type: ignore[arg-type]


def newest(names: Iterable[Name]) -> int:
    """Return the number under which the run is held, or was last; 0 where nobody ever has. Pure."""
    return max((name.number for name in names if name.kind == "held"), default=0)


def wins(mine: Name, names: Iterable[Name], given_up: Collection[Name]) -> bool:
    """Say whether a claim is first among those that a list shows. Pure."""
    others = [name for name in names if name not in given_up and name.id != mine.id]
    return not any(
        (name.kind == "claim" and name.rank < mine.rank) or (name.kind == "held" and name.number >= mine.number)
        for name in others
    )


@dataclass
class Watch:
    """What one object has shown since it was first looked at."""

    seen: Any = None
    since: float = 0.0
    """When the first look that saw this had ended."""
    looked_at: float | None = None
    silent_s: float = 0.0
    changed: bool = False

    def look(self, seen: Any, began: float, ended: float, most_s: float) -> None:
        """Take another look into account; time that passed without looks for longer than `most_s` counts for nothing.

        Args:
            began: when the look did, by the own clock.
            ended: likewise.
        """
        self.changed |= self.looked_at is not None and seen != self.seen
        if self.looked_at is None or seen != self.seen or began - self.looked_at > most_s:
            self.seen, self.since = seen, ended
        self.silent_s, self.looked_at = max(0.0, began - self.since), ended
