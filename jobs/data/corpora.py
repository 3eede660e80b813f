"""Corpora that every machine has: the interpreter's own library, its docstrings, scikit-learn's digits."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import platform
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from cluster.errors import UserError
from jobs.data.corpora_series import seasonal_series
from jobs.data.examples import Example, Rows, Source

VERSION = 2
"""Raise it when a corpus makes something else of the same files: rows encoded before are not used."""

_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = (p for p in root.rglob("*.py") if not _NOT_PROSE & set(p.relative_to(root).parts))
    return sorted(p for p in files if p.stat().st_size)


def _library_source(name: str, read: Callable[[], Rows]) -> Callable[[], Source]:
    def open_library() -> Source:
        return Source(name, digest(_library_files()), read, f"{name} {VERSION} Python {platform.python_version()}")

    return open_library


def digest(files: list[Path]) -> str:
    """Return the SHA-256 (hex) of files, names and every byte."""
    found = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        found.update(f"{path.name} {len(content)}\n".encode() + content)
    return found.hexdigest()


def _read_library() -> Rows:
    for path in _library_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        yield Example({"text": text, "path": path.name}, str(path))


def _read_docstrings() -> Rows:
    """Yield conversations: the user gives a function's signature, the assistant the first line of its docstring."""
    seen = set()
    for path in _library_files():
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # the library ships a few files that are broken on purpose
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").strip()
            signature = f"def {node.name}({ast.unparse(node.args)}):"
            if 10 <= len(summary) <= 300 and len(signature) <= 200 and (signature, summary) not in seen:
                seen.add((signature, summary))
                turns = [{"role": "user", "content": signature}, {"role": "assistant", "content": summary}]
                yield Example({"messages": turns}, f"{path}:{node.lineno}")


def _digits() -> Source:
    def read() -> Rows:
        import numpy as np
        from sklearn.datasets import load_digits

        digits = load_digits()
        for image, label in zip(digits.images, digits.target, strict=True):
            yield Example({"image": np.clip(image * 16, 0, 255).astype(np.uint8), "label": int(label)})

    found = importlib.util.find_spec("sklearn")  # not imported: that takes a second, and the rows may be there already
    if found is None or found.origin is None:
        raise UserError("data: sklearn-digits needs scikit-learn, which is not installed here")
    content = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    known = digest([content]) if content.is_file() else f"scikit-learn {metadata.version('scikit-learn')}"
    return Source("sklearn-digits", known, read, f"sklearn-digits {VERSION}")


BUILT_IN: dict[str, Callable[[], Source]] = {
    "python-stdlib": _library_source("python-stdlib", _read_library),
    "python-stdlib-docstrings": _library_source("python-stdlib-docstrings", _read_docstrings),
    "seasonal-series": seasonal_series,
    "sklearn-digits": _digits,
}
