"""Corpora that every machine has: the interpreter's own library, its docstrings (as preferences too), scikit-learn's
digits and tables, and a log of a pole being balanced."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import platform
import sysconfig
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from cluster.errors import UserError
from jobs.data import corpora_shapes, pole
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


def _functions() -> Iterator[tuple[str, str, str]]:
    """Yield of each function of the library where it stands, its signature, and its docstring, which may be empty."""
    for path in _library_files():
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # the library ships a few files that are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                signature = f"def {node.name}({ast.unparse(node.args)}):"
                yield f"{path}:{node.lineno}", signature, ast.get_docstring(node) or ""


def _read_docstrings() -> Rows:
    """Yield conversations: the user gives a function's signature, the assistant the first line of its docstring."""
    seen = set()
    for where, signature, docstring in _functions():
        summary = docstring.split("\n\n")[0].replace("\n", " ").strip()
        if 10 <= len(summary) <= 300 and len(signature) <= 200 and (signature, summary) not in seen:
            seen.add((signature, summary))
            turns = [{"role": "user", "content": signature}, {"role": "assistant", "content": summary}]
            yield Example({"messages": turns}, where)


def _read_preferences() -> Rows:
    """Yield preferences for brief answers: of a docstring the first sentence is chosen, more of it is rejected."""
    seen = set()
    for where, signature, docstring in _functions():
        text = " ".join(docstring.split())
        sentence, end, rest = text[:300].partition(". ")
        brief, long = f"{sentence}{end}".strip(), text[: len(sentence) + 120].rpartition(" ")[0]
        if 10 <= len(brief) <= 120 and len(rest) >= 30 and len(signature) <= 200 and (signature, brief) not in seen:
            seen.add((signature, brief))
            yield Example({"prompt": signature, "chosen": brief, "rejected": long}, where)


def _read_digits() -> Rows:
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    for image, label in zip(digits.images, digits.target, strict=True):
        yield Example({"image": np.clip(image * 16, 0, 255).astype(np.uint8), "label": int(label)})


def _read_breast_cancer() -> Rows:
    """Yield 569 rows: 30 measures of a tumour's cells, and what it is."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    for row, kind in zip(data.data, data.target, strict=True):
        measures = {str(name): float(value) for name, value in zip(data.feature_names, row, strict=True)}
        yield Example({**measures, "diagnosis": str(data.target_names[kind])})


def _read_diabetes() -> Rows:
    """Yield 442 rows: ten measures of a patient, as they were taken, and how far the disease went in a year."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes(scaled=False)
    for row, value in zip(data.data, data.target, strict=True):
        measures = {str(name): float(value) for name, value in zip(data.feature_names, row, strict=True)}
        yield Example({**measures, "progression": float(value)})


def _sklearn_source(name: str, files: tuple[str, ...], read: Callable[[], Rows]) -> Callable[[], Source]:
    """Return what opens a data set that comes with scikit-learn, known by the bytes of its files there."""

    def open_source() -> Source:
        found = importlib.util.find_spec("sklearn")  # not imported: that takes a second, and rows may be there already
        if found is None or found.origin is None:
            raise UserError(f"data: {name} needs scikit-learn, which is not installed here")
        content = [Path(found.origin).parent / "datasets" / "data" / file for file in files]
        there = all(path.is_file() for path in content)
        known = digest(content) if there else f"scikit-learn {metadata.version('scikit-learn')}"
        return Source(name, known, read, f"{name} {VERSION}")

    return open_source


def _pole_balance() -> Source:
    def read() -> Rows:
        for row in pole.episodes():
            yield Example(row)

    return Source("pole-balance", digest([Path(pole.__file__)]), read, f"pole-balance {VERSION}")


BUILT_IN: dict[str, Callable[[], Source]] = {
    "python-stdlib": _library_source("python-stdlib", _read_library),
    "python-stdlib-docstrings": _library_source("python-stdlib-docstrings", _read_docstrings),
    "python-stdlib-preferences": _library_source("python-stdlib-preferences", _read_preferences),
    "sklearn-digits": _sklearn_source("sklearn-digits", ("digits.csv.gz",), _read_digits),
    "sklearn-breast-cancer": _sklearn_source("sklearn-breast-cancer", ("breast_cancer.csv",), _read_breast_cancer),
    "sklearn-diabetes": _sklearn_source(
        "sklearn-diabetes", ("diabetes_data_raw.csv.gz", "diabetes_target.csv.gz"), _read_diabetes
    ),
    "pole-balance": _pole_balance,
    corpora_shapes.NAME: corpora_shapes.source,
    "seasonal-series": seasonal_series,
}
