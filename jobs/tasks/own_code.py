"""Which files the code of a user's own task is, and their digest: its module, and what that imports from beside it."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from jobs.tasks import OURS, TASKS, get

LARGEST_BYTES = 1 << 20
"""A larger file that code names is data."""
_INSTALLED = ("site-packages", "dist-packages")
_IMPORTERS = ("import_module", "__import__")


def code_digest(name: str, beside: bool = False) -> str | None:
    """Return the SHA-256 (hex) of the code of a user's own task; None for one of ours, which has a version.

    It covers the task's module, or the top folder of its package, and in the same way whatever these import from beside
    it, also inside functions; and small files beside it that they name.

    Args:
        beside: all single modules beside it count too: more than the task may use, since a row encoded by code that
            has changed is worse than one encoded again.
    """
    if name in TASKS:
        return None
    get(name)
    module = sys.modules[name.partition(":")[0]]
    parts = module.__name__.split(".")
    path = Path(module.__file__ or "").resolve()
    root = path.parents[len(parts) - (path.name != "__init__.py")]
    files = files_of(root, parts[0]) | (set(root.glob("*.py")) if beside and len(parts) == 1 else set())
    return hashlib.sha256(b"".join(_named(file, root) for file in sorted(files))).hexdigest()


def files_of(root: Path, top: str) -> set[Path]:
    """Return the files of the module or package `top` in the folder `root`, and of what it needs from beside it."""
    found: set[Path] = set()
    seen, waiting = set(), [top]
    while waiting:
        if (unit := waiting.pop()) in seen:
            continue
        seen.add(unit)
        files = _unit(root, unit)
        found |= files
        if any(part in _INSTALLED for part in root.parts):
            break  # what lies beside it there are other people's packages
        for file in (file for file in files if file.suffix == ".py"):
            named, imported = _needs(file)
            found |= {place for name in named if _is_small(place := root / name)}
            waiting += sorted(imported - set(OURS))
    return found


def _unit(root: Path, name: str) -> set[Path]:
    """Return the file of a module, and all files of a package or folder of that name."""
    folder, single = root / name, root / f"{name}.py"
    inside = {path for path in folder.rglob("*") if path.is_file()} if folder.is_dir() else set()
    kept = {
        path
        for path in inside
        if not any(part.startswith((".", "__pycache__")) for part in path.relative_to(folder).parts)
    }
    return kept | ({single} if single.is_file() else set())


def _needs(file: Path) -> tuple[set[str], set[str]]:
    """Return the texts in a Python file that may name files, and the tops of the modules that it imports."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # it cannot be imported
        return set(), set()
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    named = {text for text in texts if 0 < len(text) < 200 and "\0" not in text and not text.startswith(("/", "."))}
    return named, {name.partition(".")[0] for node in ast.walk(tree) for name in _imported(node)}


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
        yield node.module
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in _IMPORTERS:
        yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def _is_small(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size < LARGEST_BYTES
    except OSError:
        return False


def _named(path: Path, root: Path) -> bytes:
    content = path.read_bytes()
    return f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content


def difference(task: str, trained: str | None) -> str | None:
    """Say that the code of a user's own task is not that of a model; None where it is, or where that is not known.

    Args:
        task: the task's name; its code is imported.
        trained: the digest in the model's manifest.
    """
    now = code_digest(task)
    if now is None or trained is None or now == trained:
        return None
    return (
        f"the code of {task} is not the one that the model was trained with (digest {now[:12]}, then {trained[:12]}): "
        "where it reads or encodes its inputs in another way, its answers are wrong; bring the code back or train again"
    )
