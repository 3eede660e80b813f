"""Print the map of the code, one line a file, which is the first sentence of each: python tools/map.py [FOLDER …]

A Python file says it in its docstring, a C++ file in its first comment. Only the standard library is needed.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tandem.py", "cluster", "tracking", "jobs", "serve", "tools", "benchmarks", "tests")


def summary(path: Path) -> str:
    """Return what the file says first of itself, up to the end of the sentence or paragraph; "" if it says nothing."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        text = "\n".join(line.removeprefix("//").strip() for line in _first_comment(text))
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[^.…][.])\s(?=[A-Z`])", paragraph)[0].rstrip(".")


def lines(names: tuple[str, ...]) -> Iterator[str]:
    """Yield the lines of the map: a folder's name and what its `__init__.py` says, then its files, then its folders."""
    for name in names:
        path = ROOT / name
        if path.is_file():
            yield f"{name:<28} {summary(path)}"
        else:
            yield from _folder(path)


def _folder(folder: Path) -> Iterator[str]:
    files = sorted(path for path in folder.iterdir() if path.suffix in (".py", ".cpp", ".h"))
    own = folder / "__init__.py"
    if files:
        about = summary(own) if own in files else ""
        yield f"{f'{folder.relative_to(ROOT)}/':<28} {about}".rstrip()
    for path in files:
        if path != own:
            yield f"  {path.name:<26} {summary(path)}"
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))):
        yield from _folder(inner)


def _first_comment(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if not line.startswith("//"):
            return
        yield line


if __name__ == "__main__":
    print("\n".join(lines(tuple(sys.argv[1:]) or FOLDERS)))
