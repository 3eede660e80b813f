"""What decides the encoded rows, in parts that can be named: equal parts, equal rows.

The digest of all parts names the prepared data. A run notes its parts: one that goes on with others would learn from
rows that its checkpoint does not know, so it is refused, by the name of what has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from jobs import hub_folder
from jobs.data import unchanged
from jobs.data.examples import BadRow, Example, Source, bounded
from jobs.data.file_digests import file_digest
from jobs.data.ranges import SIZES, Sizes, ranges_of
from jobs.data.ranges import VERSION as RANGES_VERSION
from jobs.spec import JobSpec
from jobs.tasks import TASKS, Task, get, options, tokenization
from jobs.tasks.own_code import code_digest

FORMAT = 4

NAMES = {
    "train": "the training data (data.train or data.mixture)",
    "eval": "the held-out data (data.eval)",
    "files": "the files that the data names (images)",
    "settings": "the settings in `data`",
    "tokenizer": "the tokenizer or its chat template (task.tokenizer.from)",
    "parent": "the tokenizer, chat template or labels of the model it starts from (model.from)",
    "task": "the task or its options",
    "code": "the code of your own task",
    "reading": "how the data is read (kinds of files, or Tandem's own version)",
    "libraries": "a library that encodes (tokenizers, transformers, Pillow)",
}
"""The parts, as they are said. Those of `_BY_ROWS` do no harm where the encoded rows are the same all the same."""
_BY_ROWS = {"code", "reading", "libraries"}

_NOT_LEARNED = {"config.json", "generation_config.json", "tandem.json", "trainer_state.json", "training_args.bin"}
_NOT_LEARNED |= {"adapter_config.json", "base.json", "weights.json"}
_OTHER_KINDS = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".npz",
    ".md",
    ".png",
}
_INDEX = ".index.json"
_TEMPLATES = "additional_chat_templates"
_OF_CONFIG = ("model_type", "tokenizer_class", "auto_map")
"""What decides in a model's config.json which class reads its tokenizer."""


@dataclass(frozen=True)
class Noted:
    """What a run has noted about its data."""

    parts: Mapping[str, str] = field(default_factory=dict)
    """Name of a part → digest. Empty: it began before this was noted."""
    rows: str = ""
    """SHA-256 (hex) of the encoded rows."""
    weights: str = ""
    """SHA-256 (hex) of the model that the run began from (jobs/lineage.py)."""


def parts_of(
    spec: JobSpec,
    train: Source | None,
    held_out: Source | None,
    parent: Path | str | None,
    base: Path,
    sizes: Sizes = SIZES,
) -> dict[str, str]:
    """Digest what decides the rows of a job."""
    task = get(spec.task.name)
    own_tokenizer = (spec.task.options.get("tokenizer") or {}).get("from")
    reading = [source.reading if source else None for source in (train, held_out)]
    limits = ((train, spec.data.max_examples), (held_out, None))
    several = any(
        len(ranges_of(source, task(spec.task.options), limit, sizes)) > 1 for source, limit in limits if source
    )
    reading += [f"ranges {RANGES_VERSION}"] if several else []
    other = {"train", "mixture", "eval", "predict", "eval_max_rows", "start_early"} | (
        {"duplicates"} if spec.data.duplicates == "keep" else set()
    )
    settings = spec.data.model_dump(mode="json", by_alias=True, exclude=other)
    return {
        "train": train.digest if train else "",
        "eval": held_out.digest if held_out else "",
        "files": _files_digest([source for source in (train, held_out) if source], task(spec.task.options)),
        "settings": _sha256(settings),
        "tokenizer": learned_digest(tokenization.located(own_tokenizer, base), task) if own_tokenizer else "",
        "parent": learned_digest(parent, task) if parent else "",
        "task": _sha256(options.decisive(spec.task.model_dump())),
        "code": code_digest(spec.task.name, beside=True) or "",
        "reading": _sha256([FORMAT, task.version, *reading]),
        "libraries": _sha256(_libraries(spec)),
    }


def _files_digest(found: list[Source], task: Task) -> str:
    """Digest the files that rows name, every byte; "" where the task opens none. A row that is bad counts later."""
    named = [source for source in found if source.names_files]
    if type(task).files is Task.files or not named:
        return ""
    digest = hashlib.sha256()
    naming = [single.origin or single.name for source in named for single in source.singles]
    with unchanged.noted_for(["named by the rows of", *naming], Path()):
        for row in (row for source in named for row in source.read() if isinstance(row, Example)):
            paths = bounded(partial(task.files, row), row.where)
            for path in () if isinstance(paths, BadRow) else paths:
                content = file_digest(path) if path.is_file() else None
                digest.update(f"{path} {content}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def digest_of(parts: Mapping[str, str]) -> str:
    """Return the digest that names the data, SHA-256 in hex."""
    return _sha256(dict(parts))


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of the parts that differ."""
    return [part for part in NAMES if part in before and before[part] != now.get(part)]


def check_same(before: Noted, now: Mapping[str, str], rows: str | None = None) -> list[str]:
    """Refuse to go on with other data; return what is to be said where that is harmless.

    Args:
        before: what the run has noted.
        now: the parts as they are.
        rows: digest of the rows as they are encoded now; None: they are not yet.

    Raises:
        UserError: something has changed; the message names it, and the way out.
    """
    parts = changed(before.parts, now)
    harmless = [part for part in parts if part in _BY_ROWS and rows in (None, before.rows)]
    serious = [part for part in parts if part not in harmless]
    if serious:
        raise UserError(
            f"the run cannot go on: since it began, {_listed(serious)} changed. Bring it back as it was, or begin a "
            "new run with --set checkpoint.resume=never; this one keeps its checkpoints"
        )
    return [f"since the run began, {_listed(harmless)} changed; the encoded rows are the same"] if harmless else []


def _listed(parts: list[str]) -> str:
    return " and ".join(NAMES[part] for part in parts)


def learned_digest(model: Path | str, task: type[Task]) -> str:
    """Digest what a model directory (or a hub id) holds besides weights that decides how data is encoded.

    Another version of the same model, with other weights, encodes alike and has the same digest.
    """
    folder = Path(model) if Path(model).is_dir() else hub_folder.fetched(str(model))
    if folder is None:
        return _sha256(str(model))
    found = {str(path.relative_to(folder)): _content(path) for path in _deciding(folder, task)}
    config = folder / "config.json"
    if "config.json" not in found and config.is_file():
        found["config.json"] = _sha256(_of_config(config))
    return _sha256(found)


def _deciding(folder: Path, task: type[Task]) -> list[Path]:
    """List the files that a tokenizer, a template or labels may be read from: all but those that cannot matter."""
    beside = [path for path in folder.iterdir() if path.is_file() and path.suffix.lower() not in _OTHER_KINDS]
    kept = [p for p in beside if p.name not in _NOT_LEARNED and not p.name.startswith(".")]
    kept = [path for path in kept if not path.name.endswith(_INDEX)]
    named = [path for name in task.learned_files if (path := folder / name).is_file()]
    return sorted({*kept, *named, *(folder / _TEMPLATES).glob("*.jinja")})


def _of_config(config: Path) -> Any:
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        return {key: values.get(key) for key in _OF_CONFIG}
    except (ValueError, AttributeError):
        return _content(config)


def _libraries(spec: JobSpec) -> dict[str, str]:
    tokenises = "tokenizer" in spec.task.options
    names = ["tokenizers", "transformers"] if tokenises else ["pillow"]
    names += ["pillow"] if spec.task.name not in TASKS and tokenises else []
    return {name: metadata.version(name) for name in names}


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
