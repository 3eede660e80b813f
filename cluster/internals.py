"""The form in which the adapters register what they use of other libraries' private interfaces.

An adapter is a module whose name ends in `_internals`: one per library, and one per layer where layers must not import
each other. Nothing else touches private interfaces (tests/contracts/test_drift.py), and every entry of an adapter's
`ENTRIES` has a check that runs in milliseconds (tests/contracts/), so that an upgrade names what it broke.
"""

from __future__ import annotations

from typing import NamedTuple


class Internal(NamedTuple):
    """One private interface. (No dataclass: a worker's start would pay 15 ms for importing them.)"""

    name: str
    """Dotted name, variable or file, as the library calls it."""
    why: str
    """What Tandem uses it for, and why no public interface will do."""
    without: str
    """What breaks where it is gone or has changed."""
    until: str
    """When the use can go."""

    def explain(self, found: object) -> str:
        """Return what to tell an engineer whose upgrade has changed it."""
        return (
            f"{self.name} is not what Tandem relies on: {found}\n  used: {self.why}\n  without it: {self.without}\n"
            f"  can go: {self.until}"
        )
