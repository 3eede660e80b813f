"""What a model folder from anywhere asks of whoever loads it: code of its own, pickles, quantised weights.

Read from its files' names and configs alone, before anything is loaded. transformers would pass code of a model's own
over in silence and put a built-in class in its place, and a pickle runs whatever it holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tracking.errors import TrackingError
from tracking.manifest import FILE_NAME

CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
BESIDE_WEIGHTS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth")
"""Pickles that trainers leave and nobody loads."""


def problems(folder: Path) -> list[str]:
    """Return why the model in `folder` cannot be loaded safely, one sentence each; empty if it can."""
    return [*_own_code(folder), *_pickled(folder)]


def check(folder: Path, what: str) -> None:
    """Refuse a folder with problems.

    Args:
        what: what the user calls it, for the message.

    Raises:
        TrackingError: it needs code of its own, or its weights are pickles.
    """
    if found := problems(folder):
        raise TrackingError("\n".join(f"{what}: {problem}" for problem in found))


def quantisation(folder: Path) -> str | None:
    """Return how the weights in `folder` are quantised, by its manifest, else by its config; None for not at all."""
    method = (_read(folder / FILE_NAME).get("quantization") or {}).get("method")
    if method is None:
        config = _read(folder / "config.json")
        settings = config.get("quantization_config") or config.get("compression_config")
        method = settings.get("quant_method", "a method it does not name") if isinstance(settings, dict) else None
    return None if method is None else str(method)


def _own_code(folder: Path) -> Iterator[str]:
    for name in CONFIGS:
        for classes in _values(_read(folder / name), "auto_map"):
            wanted = ", ".join(sorted(map(str, classes.values()))) if isinstance(classes, dict) else classes
            yield (
                f"{folder / name} has `auto_map` ({wanted}): the model needs code of its own, which Tandem does not "
                "run. Where transformers' own class does the same, remove `auto_map` from that file"
            )


def _pickled(folder: Path) -> Iterator[str]:
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    if any(path.suffix == ".safetensors" for path in files):
        return
    pickles = sorted(path.name for path in files if path.suffix in PICKLES and path.name not in BESIDE_WEIGHTS)
    if pickles:
        more = f" and {len(pickles) - 1} more" if len(pickles) > 1 else ""
        yield (
            f"{folder / pickles[0]}{more}: weights in a pickle, which can run any code when they are loaded; convert "
            "them to safetensors where you trust them (model.save_pretrained in transformers does)"
        )


def _values(tree: Any, key: str) -> Iterator[Any]:
    """Yield what stands under `key` anywhere in a tree of mappings, unless it is empty."""
    if isinstance(tree, dict):
        if tree.get(key):
            yield tree[key]
        for inner in tree.values():
            yield from _values(inner, key)


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is none: whoever loads the model says what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
