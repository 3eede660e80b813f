"""Which start of a worker group may commit and delete: the newest one that has entered.

    <root>/attempts/00000003-<attempt>     the third start of a group on these checkpoints

Two that enter at one moment may find the same number: the one whose name is the higher is the newer then, for both. A
group that was stopped (a machine that was suspended, a network that was cut) and wakes up later finds a higher number
than its own. Files carry their attempt's name anyway; the fence keeps the manifest and the deletions to the newest.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import UserError
from cluster.stores import repeated
from jobs.checkpoint.store import Store

FOLDER = "attempts"


class Superseded(UserError):
    """A newer start of the worker group works on these checkpoints; starting again would take them away from it."""

    exit_code = 1


@dataclass(frozen=True)
class Fence:
    """One group's place in the order of all that have written here."""

    store: Store
    number: int
    attempt: str

    @staticmethod
    def enter(store: Store, attempt: str) -> Fence:
        """Take the next number: from now on, whoever entered before commits and deletes nothing."""
        numbers = [number for number, _ in _entered(store)]
        fence = Fence(store, max(numbers, default=0) + 1, attempt)
        repeated(lambda: store.write(f"{FOLDER}/{fence.number:08d}-{attempt}", [b"."]))
        for number, name in _entered(store):
            if number < fence.number - 1:
                store.remove_files(FOLDER, f"{number:08d}-{name}")
        return fence

    def leave(self) -> None:
        """Take the number back: who entered before goes on."""
        self.store.remove_files(FOLDER, f"{self.number:08d}-{self.attempt}")

    def check(self) -> None:
        """Return if nobody has entered since.

        Raises:
            Superseded: somebody has. Nothing of the checkpoints may be touched any more.
        """
        newest, name = max(_entered(self.store), default=(0, ""))
        if (newest, name) > (self.number, self.attempt):
            raise Superseded(f"a newer attempt ({name}) works on these checkpoints; this one has come back late")


def _entered(store: Store) -> list[tuple[int, str]]:
    parts = (name.partition("-") for name in store.files(FOLDER))
    return [(int(number), name) for number, _, name in parts if number.isdigit()]
