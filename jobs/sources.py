"""Where raw examples come from: files, globs, image folders, the hub, and corpora that every machine has.

A source is a list of dictionaries in a fixed order, with a name and a digest of its content. Text files are one
example each (`text`); JSONL, JSON, CSV, TSV and Parquet give one example a row; a folder of folders of images gives
`image` and `label`.
"""

from __future__ import annotations

import ast
import csv
import glob
import hashlib
import inspect
import json
import platform
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError

Example = dict[str, Any]

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".text"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
SMALL = 20
"""With fewer documents than this, each is cut to hold a share of its text out, instead of whole documents."""


@dataclass(frozen=True)
class Source:
    """Raw examples with where they are from (`name`) and what they are (`digest`, SHA-256 hex of the content)."""

    name: str
    digest: str
    read: Callable[[], Iterator[Example]]

    def examples(self, limit: int | None = None) -> list[Example]:
        """Read the examples, at most `limit`.

        Raises:
            UserError: there is none, or a file cannot be read; the message names file and line.
        """
        found = []
        for example in self.read():
            found.append(example)
            if limit is not None and len(found) == limit:
                break
        if not found:
            raise UserError(f"data: {self.name} holds no example")
        return found


def open_source(where: str | Sequence[str], base: Path) -> Source:
    """Open what `data.train` or `data.eval` names; relative paths start at `base`.

    Raises:
        UserError: nothing there, or of an unknown kind.
    """
    if not isinstance(where, str):
        return _concatenate([open_source(part, base) for part in where])
    if where in BUILT_IN:
        return BUILT_IN[where]()
    if where.startswith("hf://"):
        return _hub(where.removeprefix("hf://"))
    paths = _paths(where, base)
    if not paths:
        hint = "; a data set of the hub is written hf://owner/name" if where.count("/") == 1 else ""
        raise UserError(f"data: nothing matches {where!r} (looked from {base}); built in: {', '.join(BUILT_IN)}{hint}")
    if len(paths) == 1 and paths[0].is_dir():
        return _folder(paths[0])
    return _concatenate([_file(path) for path in paths]) if len(paths) > 1 else _file(paths[0])


def split(examples: list[Example], fraction: float, seed: int, text_column: str) -> tuple[list[Example], list[Example]]:
    """Hold a share of the examples out, chosen by the seed; of a few long texts, the end of each."""
    if not fraction:
        return examples, []
    if len(examples) < SMALL and all(isinstance(e.get(text_column), str) for e in examples):
        cuts = [int(len(e[text_column]) * (1 - fraction)) for e in examples]
        pairs = list(zip(examples, cuts, strict=True))
        return (
            [{**e, text_column: e[text_column][:cut]} for e, cut in pairs],
            [{**e, text_column: e[text_column][cut:]} for e, cut in pairs],
        )
    held_out = set(random.Random(seed).sample(range(len(examples)), max(1, round(len(examples) * fraction))))
    kept = [e for i, e in enumerate(examples) if i not in held_out]
    if not kept:
        raise UserError(f"data.eval_fraction {fraction} leaves nothing of {len(examples)} example(s) to train on")
    return kept, [examples[i] for i in sorted(held_out)]


def _paths(where: str, base: Path) -> list[Path]:
    pattern = where if Path(where).is_absolute() else str(base / where)
    return sorted(Path(path) for path in glob.glob(pattern, recursive=True))


def _concatenate(sources: list[Source]) -> Source:
    digest = hashlib.sha256("".join(source.digest for source in sources).encode()).hexdigest()
    name = sources[0].name if len(sources) == 1 else f"{sources[0].name} and {len(sources) - 1} more"
    return Source(name, digest, lambda: (example for source in sources for example in source.read()))


def _file(path: Path) -> Source:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"data: {path} has an unknown kind {path.suffix!r}; known: {', '.join(sorted(READERS))}")
    return Source(path.name, _file_digest(path), lambda: reader(path))


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    except OSError as error:
        raise UserError(f"data: cannot read {path}: {error.strerror}") from error


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _read_text(path: Path) -> Iterator[Example]:
    yield {"text": _decode(path)}


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file"
        ) from None


def _read_json_lines(path: Path) -> Iterator[Example]:
    for number, line in enumerate(_decode(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error.msg} (column {error.colno})") from None
        if not isinstance(value, dict):
            raise UserError(f"{path}:{number}: a line holds one object, this is a {type(value).__name__}")
        yield value


def _read_json(path: Path) -> Iterator[Example]:
    try:
        values = json.loads(_decode(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise UserError(f"{path}: expected a list of objects; one object a line is .jsonl")
    yield from values


def _read_separated(separator: str) -> Callable[[Path], Iterator[Example]]:
    def read(path: Path) -> Iterator[Example]:
        rows = csv.DictReader(_decode(path).splitlines(keepends=True), delimiter=separator, strict=True)
        try:
            for row in rows:
                if None in row or None in row.values():
                    raise UserError(
                        f"{path}:{rows.line_num}: the row has not the {len(rows.fieldnames or [])} columns"
                        " of the header"
                    )
                yield dict(row)
        except csv.Error as error:
            raise UserError(f"{path}:{rows.line_num}: {error}") from None

    return read


def _read_parquet(path: Path) -> Iterator[Example]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[Example]]] = {
    **dict.fromkeys(TEXT_SUFFIXES, _read_text),
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_separated(","),
    ".tsv": _read_separated("\t"),
    ".parquet": _read_parquet,
}


def _folder(path: Path) -> Source:
    images = sorted(p for p in path.glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if images:
        digests = "".join(f"{p.parent.name}{_file_digest(p)}" for p in images)
        digest = hashlib.sha256(digests.encode()).hexdigest()
        return Source(path.name, digest, lambda: ({"image": p.read_bytes(), "label": p.parent.name} for p in images))
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS)
    if not files:
        raise UserError(
            f"data: {path} holds neither <label>/<image> files nor files of a known kind ({', '.join(READERS)})"
        )
    return Source(
        path.name, _concatenate([_file(p) for p in files]).digest, _concatenate([_file(p) for p in files]).read
    )


def _hub(identifier: str) -> Source:
    name, _, split_name = identifier.partition(":")

    def read() -> Iterator[Example]:
        import datasets

        try:
            yield from datasets.load_dataset(name, split=split_name or "train")
        except Exception as error:  # the hub's client raises many kinds; what matters is which data set and why
            raise UserError(f"data: cannot load hf://{identifier}: {str(error).splitlines()[0]}") from error

    return Source(f"hf://{identifier}", hashlib.sha256(identifier.encode()).hexdigest(), read)


# -- corpora that every machine has ---------------------------------------------------------------------------------

_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = (p for p in root.rglob("*.py") if not _NOT_PROSE & set(p.relative_to(root).parts))
    return sorted(p for p in files if p.stat().st_size)


def _library_source(name: str, read: Callable[[], Iterator[Example]]) -> Callable[[], Source]:
    def open_library() -> Source:
        state = [f"{p.name}:{p.stat().st_size}" for p in _library_files()]
        identity = f"{name} {platform.python_version()} {state}"
        return Source(name, hashlib.sha256(identity.encode()).hexdigest(), read)

    return open_library


def _read_library() -> Iterator[Example]:
    for path in _library_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        yield {"text": text, "path": path.name}


def _read_docstrings() -> Iterator[Example]:
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
                yield {"messages": [{"role": "user", "content": signature}, {"role": "assistant", "content": summary}]}


def _digits() -> Source:
    def read() -> Iterator[Example]:
        import numpy as np
        from sklearn.datasets import load_digits

        digits = load_digits()
        for image, label in zip(digits.images, digits.target, strict=True):
            yield {"image": np.clip(image * 16, 0, 255).astype(np.uint8), "label": int(label)}

    return Source("sklearn-digits", hashlib.sha256(inspect.getsource(read).encode()).hexdigest(), read)


BUILT_IN: dict[str, Callable[[], Source]] = {
    "python-stdlib": _library_source("python-stdlib", _read_library),
    "python-stdlib-docstrings": _library_source("python-stdlib-docstrings", _read_docstrings),
    "sklearn-digits": _digits,
}
