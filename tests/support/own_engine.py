"""The engine of one's own that docs/engine.md shows, as tests use it: the page is what is tested."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "engine.md"


def write(folder: Path) -> None:
    """Write the page's engine to `folder` as my_engine.py, which counts an image's pixels above a threshold."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (source,) = [block for block in blocks if "ENGINE = EngineEntry(" in block]
    (folder / "my_engine.py").write_text(source, encoding="utf-8")
