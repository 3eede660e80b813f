"""What a device costs by the hour: a table in a file, of `--prices` or in `$TANDEM_HOME`.

currency: EUR                                  may be left out
per_hour: {h100: 2.5, a100-80: 1.2, cpu: 0.05}     of one known device; cpu: of one worker on CPUs
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cluster import specfile
from cluster.errors import UserError
from cluster.home import home
from cluster.strict import Strict, Text
from jobs.plan import devices
from jobs.plan.devices import Device

NAME = "prices.yaml"
"""In $TANDEM_HOME: the table that is used where no other is named."""


class PriceTable(Strict):
    """A file of prices."""

    currency: Text | None = None
    """What they are in."""
    per_hour: dict[str, Annotated[float, Field(strict=True, ge=0, le=1e9)]] = Field(min_length=1)
    """Device → price of one for an hour."""


@dataclass(frozen=True)
class Price:
    """Of one device and hour."""

    per_hour: float
    currency: str = ""
    """Empty: nobody said."""
    source: str = ""
    """The file that says so; empty: the command line does."""


@dataclass(frozen=True)
class Prices:
    """What a reader of a plan has said of prices."""

    by_device: dict[str, Price]
    """By the names of the device table, and `cpu`."""
    path: Path
    asked: bool
    """Whether the file was named, and not just there."""


def find(named: Path | None) -> Prices | None:
    """Return the prices of a file, or of the one in $TANDEM_HOME where none is named; None where that is not there.

    Raises:
        UserError: it cannot be read, a device is unknown or there twice, or a price is none.
    """
    path = named or home() / NAME
    if named is None and not path.exists():
        return None
    if not path.is_file():
        raise UserError(
            f"{'--prices: ' if named else ''}{path} is no file; it holds `per_hour: {{h100: 2.5}}`, and `currency: EUR`"
        )
    table, found = specfile.load(path, PriceTable), dict[str, Price]()
    for name, price in table.per_hour.items():
        key = devices.key_of(name)
        if key is None or key in found:
            why = "is there twice" if key else f"is no device whose figures are known: {', '.join(devices.KEYS)}"
            raise UserError(f"{specfile.place(path, f'per_hour.{name}')}: `per_hour`: {name!r} {why}")
        found[key] = Price(price, table.currency or "", str(path))
    return Prices(found, path, asked=named is not None)


def of(device: Device, per_hour: float | None, known: Prices | None) -> tuple[Price | None, list[str]]:
    """Return the price of a device, and what is to be said where a table that is there does not have it. Pure.

    Args:
        per_hour: what the command line says.

    Raises:
        UserError: a file was named that lacks it.
    """
    if per_hour is not None:
        return Price(per_hour), []
    if known is None or (price := known.by_device.get(device.key)) is not None:
        return (None if known is None else price), []
    lacks = f"{known.path} has no price of {device.name}"
    lacks += f" (per_hour.{device.key})" if device.key else ", which is in no table: --price-per-hour gives one"
    if known.asked:
        raise UserError(f"--prices: {lacks}; it has those of {', '.join(known.by_device)}")
    return None, [f"no cost: {lacks}"]
