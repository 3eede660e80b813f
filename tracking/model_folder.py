"""What a model folder from anywhere asks of whoever loads it: code of its own, pickles, another model, whole weights.

Read from its files' names, configs and the headers of its weights, before anything is loaded. transformers would pass
code of a model's own over in silence and put a built-in class in its place, and a pickle runs whatever it holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tracking.errors import TrackingError
from tracking.manifest import FILE_NAME

NO_CONFIGS = ("tokenizer.json", "vocab.json", "added_tokens.json", FILE_NAME)
"""JSON files that are tables or Tandem's own: a token may be called as one pleases."""
LARGEST_CONFIG = 8 << 20
"""A larger JSON file is data, unless it is called a config."""
OWN_CODE = ("auto_map", "custom_pipelines")
"""Entries that name classes of the model's own, in whatever config of its folder they stand."""
GENERATE = Path("custom_generate", "generate.py")
"""transformers replaces `generate` by what lies there."""
ADAPTER = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
BESIDE_WEIGHTS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth")
"""Pickles that trainers leave and nobody loads."""
INDEX = ".safetensors.index.json"


def problems(folder: Path) -> list[str]:
    """Return why the model in `folder` cannot be loaded safely, one sentence each; empty if it can."""
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    return [*own_code(folder), *_adapter(folder), *pickled(folder, names)]


def check(folder: Path, what: str) -> None:
    """Refuse a folder with problems.

    Args:
        what: what the user calls it, for the message.

    Raises:
        TrackingError: it needs code of its own, is no whole model, or its weights are pickles.
    """
    refuse(what, problems(folder))


def refuse(what: str, found: list[str]) -> None:
    """Raise what was found wrong with a model, if anything was.

    Raises:
        TrackingError: a line for each problem, with what the user calls the model.
    """
    if found:
        raise TrackingError("\n".join(f"{what}: {problem}" for problem in found))


def own_code(folder: Path) -> list[str]:
    """Return where the folder of a model or a tokenizer asks for code of its own, one sentence each."""
    found = [sentence for path in _configs(folder) for sentence in _asked_for(path)]
    if (folder / GENERATE).is_file():
        found.append(
            f"{folder / GENERATE}: the model generates by code of its own, which Tandem does not run. Where ordinary "
            "generation does as well, remove that folder"
        )
    return found


def pickled(folder: Path, names: list[str]) -> list[str]:
    """Return the sentence about weights that are pickles, where there are none that are not.

    Args:
        names: of the model's files, also where they are not here yet.
    """
    if any(name.endswith(".safetensors") and not name.startswith("adapter_") for name in names):
        return []
    pickles = sorted(name for name in names if name.endswith(PICKLES) and Path(name).name not in BESIDE_WEIGHTS)
    if not pickles:
        return []
    more = f" and {len(pickles) - 1} more" if len(pickles) > 1 else ""
    return [
        f"{folder / pickles[0]}{more}: weights in a pickle, which can run any code when they are loaded; convert "
        "them to safetensors where you trust them (model.save_pretrained in transformers does)"
    ]


def damage(folder: Path) -> list[str]:
    """Return what is missing or cut short of the weights in `folder`, one sentence each, by indexes and headers."""
    found = []
    for index in sorted(folder.glob(f"*{INDEX}")):
        shards = _read(index).get("weight_map")
        named = {str(shard) for shard in shards.values()} if isinstance(shards, dict) else set()
        lacking = sorted(name for name in named if not (folder / name).is_file())
        if not named:
            found.append(f"{index} names no files of weights: copy the model again")
        elif lacking:
            found.append(f"{index} names {', '.join(lacking)}, and that is not there: copy the model again")
    return [*found, *(fault for path in sorted(folder.glob("*.safetensors")) if (fault := _fault(path)))]


def quantisation(folder: Path) -> str | None:
    """Return how the weights in `folder` are quantised, by its manifest, else by its config; None for not at all."""
    method = (_read(folder / FILE_NAME).get("quantization") or {}).get("method")
    if method is None:
        config = _read(folder / "config.json")
        settings = next(
            (each for key in ("quantization_config", "compression_config") for each in _values(config, key)), None
        )
        if settings is not None:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            method = method or "a method it does not name"
    return None if method is None else str(method)


def _configs(folder: Path) -> list[Path]:
    """List the JSON files of a folder that may be configs, whatever they are called."""
    files = [path for path in folder.glob("*.json") if path.name not in NO_CONFIGS and not path.name.endswith(INDEX)]
    return sorted(
        path
        for path in files
        if path.is_file() and (path.name.endswith("config.json") or path.stat().st_size <= LARGEST_CONFIG)
    )


def _asked_for(path: Path) -> Iterator[str]:
    """Yield what a config asks for that Tandem does not do, one sentence each."""
    config = _read(path)
    for key in OWN_CODE:
        for classes in _values(config, key):
            if wanted := sorted(set(_texts(classes))):
                yield (
                    f"{path} has `{key}` ({', '.join(wanted)}): the model needs code of its own, which Tandem does not "
                    f"run. Where transformers' own class does the same, remove `{key}` from that file"
                )
    if any(value is True for value in _values(config, "trust_remote_code")):
        yield (
            f"{path} has `trust_remote_code`: the model needs code of its own, which Tandem does not run. Where it "
            "does not, remove the entry from that file"
        )


def _adapter(folder: Path) -> Iterator[str]:
    path = folder / ADAPTER
    if not path.is_file():
        return
    if (folder / "config.json").is_file():
        yield (
            f"{path}: an adapter lies beside the weights of a whole model, and whether these hold it already is not "
            f"known. Where they do, remove {ADAPTER}; where not, merge it (merge_and_unload in peft, then "
            "save_pretrained)"
        )
        return
    base = _read(path).get("base_model_name_or_path")
    yield (
        f"{folder} holds an adapter{f' for {base}' if base else ''}, not a whole model: merge it into that model "
        "(merge_and_unload in peft, then save_pretrained) and name the folder of the result"
    )


def _fault(path: Path) -> str | None:
    """Say what is wrong with a safetensors file by its header; None if nothing is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header: Any = json.loads(file.read(length)) if 0 < length <= size - 8 else None
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, TypeError, LookupError):
            return f"{path} is no whole safetensors file ({size} bytes): copy the model again"
    whole = 8 + length + max(ends, default=0)
    return None if size == whole else f"{path} has {size} bytes, its header says {whole}: copy the model again"


def _values(tree: Any, key: str) -> Iterator[Any]:
    """Yield what stands under `key` anywhere in a tree of mappings and lists, unless it is empty."""
    if isinstance(tree, dict):
        if tree.get(key):
            yield tree[key]
        for inner in tree.values():
            yield from _values(inner, key)
    elif isinstance(tree, list):
        for inner in tree:
            yield from _values(inner, key)


def _texts(tree: Any) -> Iterator[str]:
    """Yield the texts in a tree of mappings and lists, but not the keys."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for inner in tree.values() if isinstance(tree, dict) else tree:
            yield from _texts(inner)


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is none: whoever loads the model says what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
