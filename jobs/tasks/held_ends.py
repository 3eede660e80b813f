"""How a task that holds out the end of every example marks the part whose end is to be predicted."""

from __future__ import annotations

from typing import Any


class HeldEnd(list[Any]):
    """A column of a grouped example whose end is to be predicted, and not learned from."""
