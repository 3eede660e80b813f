"""How long prompts and answers are, in tokens: fixed, or drawn from a distribution."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from cluster.errors import UserError

LONGEST = 10_000_000
"""More tokens than any model's context has."""
FORMS = "64, uniform:16:128, lognormal:64:0.5 (median, sigma) or lognormal:64:0.5:512 (at most 512)"


@dataclass(frozen=True)
class Length:
    """A distribution of lengths in tokens."""

    kind: Literal["fixed", "uniform", "lognormal"]
    middle: float
    """The length itself, the least one of a uniform distribution, the median of a lognormal one."""
    spread: float = 0.0
    """The greatest length of a uniform distribution, the sigma of a lognormal one."""
    most: int = LONGEST
    """What a lognormal length is cut to."""

    def draw(self, chance: random.Random) -> int:
        """Return one length, at least 1."""
        if self.kind == "fixed":
            return int(self.middle)
        if self.kind == "uniform":
            return chance.randint(int(self.middle), int(self.spread))
        return min(self.most, max(1, round(self.middle * chance.lognormvariate(0.0, self.spread))))

    def __str__(self) -> str:
        if self.kind == "fixed":
            return f"{self.middle:g}"
        cut = f":{self.most}" if self.most != LONGEST else ""
        return f"{self.kind}:{self.middle:g}:{self.spread:g}{cut}"


def parse(text: str, option: str) -> Length:
    """Read a length as an option has it. Raises UserError that names the option."""
    kind, *numbers = text.split(":") if ":" in text else ("fixed", text)
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    found = _made(kind, values)
    if found is None:
        raise UserError(f"{option}: {text!r} is no length in tokens; write {FORMS}")
    return found


def _made(kind: str, values: list[float]) -> Length | None:
    """Return the length, or None where the numbers do not fit the kind."""
    whole = all(value.is_integer() and 1 <= value <= LONGEST for value in values)
    if kind == "fixed" and len(values) == 1 and whole:
        return Length("fixed", values[0])
    if kind == "uniform" and len(values) == 2 and whole and values[0] <= values[1]:
        return Length("uniform", values[0], values[1])
    if kind == "lognormal" and len(values) in (2, 3) and 1 <= values[0] <= LONGEST and 0 <= values[1] <= 10:
        most = values[2] if len(values) == 3 else LONGEST
        return Length("lognormal", values[0], values[1], int(most)) if 1 <= most <= LONGEST else None
    return None
