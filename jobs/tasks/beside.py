"""Where a row of a table is from, for the files that it names: a relative name starts at the table's folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LINE = re.compile(r"(:\d+|\[\d+\]|: row \d+)$")
"""What stands behind the file's path in an example's `where`."""


def table_of(example: Mapping[str, Any]) -> Path | None:
    """Return the file that an example is a row of; None where it is of none, or of none that is known."""
    table = Path(_LINE.sub("", getattr(example, "where", "")))
    return table if table.is_file() else None
