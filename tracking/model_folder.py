"""What a model folder from anywhere asks of whoever loads it: code of its own, pickles, another model, whole weights.

Read from its files' names, configs and the headers of its weights, before anything is loaded. transformers would pass
code of a model's own over in silence and put a built-in class in its place, and a pickle runs whatever it holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster import stored_weights
from tracking import model_store, weights_digest
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
ADAPTER, BASE = "adapter_config.json", "base.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
BESIDE_WEIGHTS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth")
"""Pickles that trainers leave and nobody loads."""
INDEX = ".safetensors.index.json"
PARTS = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".SCB", ".absmax")
"""Ends of the names of tensors that quantised layers have."""
TOKENS, NUMBERS = ("eos_token_id", "bos_token_id", "pad_token_id"), ("temperature", "top_p", "top_k", "min_p")
"""Entries of generation_config.json that are numbers of tokens, and numbers."""


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


def check_base(folder: Path) -> None:
    """Refuse adapters whose base is to be on this machine and is not what they were trained on; reads its weights.

    A base on the hub is known by its commit, under which files never change.

    Raises:
        TrackingError: it is not there, or holds other weights; or the same of the base of a base.
    """
    adapters, seen = folder, set[Path]()
    while (base := _base_here(adapters)) is not None and adapters not in seen:
        refuse(str(folder), list(_of_base(adapters, base)))
        if weights_digest.of_folder(base) != _read(adapters / BASE).get("digest"):
            raise TrackingError(
                f"{adapters} holds adapters for the model in {base}, whose weights have changed since: bring it back "
                "as it was"
            )
        seen.add(adapters)
        adapters = base


def _base_here(folder: Path) -> Path | None:
    """Return where on this machine the base of a folder of adapters is to be; None for any other, or one on a hub.

    One in a store is fetched, but for its weights.
    """
    at = _read(folder / BASE).get("at")
    return model_store.located(at) if isinstance(at, str) and (folder / ADAPTER).is_file() else None


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
    """Return what cannot be read of a model in `folder`, one sentence each: configs, indexes, headers of weights."""
    found = [f"{path} is no JSON object: copy the model again" for path in _broken(folder)]
    found += _wrong_in_generation(folder / "generation_config.json")
    if _said_method(folder) is None and (stored := _stored_method(folder)) is not None:
        found.append(
            f"{folder}: {stored}, as quantised layers do, and config.json has no quantization_config to read it by"
        )
    in_store = stored_weights.read(folder)
    elsewhere = set() if in_store is None else set(in_store.files)
    for index in sorted(folder.glob(f"*{INDEX}")):
        shards = _read(index).get("weight_map")
        named = {str(shard) for shard in shards.values()} if isinstance(shards, dict) else set()
        lacking = sorted(name for name in named - elsewhere if not (folder / name).is_file())
        if not named:
            found.append(f"{index} names no files of weights: copy the model again")
        elif lacking:
            found.append(f"{index} names {', '.join(lacking)}, and that is not there: copy the model again")
    return [*found, *(fault for path in sorted(folder.glob("*.safetensors")) if (fault := _fault(path)))]


def quantisation(folder: Path) -> str | None:
    """Return how the weights in `folder` are quantised, by manifest, config or weights; None for not at all."""
    return _said_method(folder) or _stored_method(folder)


def _said_method(folder: Path) -> str | None:
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


def _stored_method(folder: Path) -> str | None:
    return next((kind for path in sorted(folder.glob("*.safetensors")) if (kind := _stored(path))), None)


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
    at = _read(folder / BASE).get("at")
    if at is not None:  # Tandem's own, which say by what digest their base is known
        if (base := model_store.located(str(at))) is not None:
            yield from _of_base(folder, base)
        return
    if (folder / "config.json").is_file():
        yield (
            f"{path}: an adapter lies beside the weights of a whole model, and whether these hold it already is not "
            f"known. Where they do, remove {ADAPTER}; where not, merge it (merge_and_unload in peft, then "
            "save_pretrained)"
        )
        return
    other = _read(path).get("base_model_name_or_path")
    yield (
        f"{folder} holds an adapter{f' for {other}' if other else ''}, not a whole model: merge it into that model "
        "(merge_and_unload in peft, then save_pretrained) and name the folder of the result"
    )


def _of_base(folder: Path, base: Path) -> Iterator[str]:
    """Yield what is wrong with the base of adapters, where that is to be on this machine."""
    if base.resolve() != folder.resolve():
        if base.is_dir():
            yield from problems(base)
        else:
            yield f"{folder} holds adapters for the model in {base}, which is not there: put that back (a link will do)"


def _fault(path: Path) -> str | None:
    """Say what is wrong with a safetensors file by its header; None if nothing is."""
    size, (header, length) = path.stat().st_size, _header(path)
    try:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (AttributeError, TypeError, LookupError):
        return f"{path} is no whole safetensors file ({size} bytes): copy the model again"
    whole = 8 + length + max(ends, default=0)
    return None if size == whole else f"{path} has {size} bytes, its header says {whole}: copy the model again"


def _stored(path: Path) -> str | None:
    """Tell by a safetensors file's header that its weights are those of quantised layers, whatever the config says."""
    header, _ = _header(path)
    for name, entry in header.items() if isinstance(header, dict) else ():
        kind = entry.get("dtype", "") if isinstance(entry, dict) else ""
        if str(kind).startswith("F8") or name.endswith(PARTS):
            return f"{path.name} holds {name} as {kind}"
    return None


def _header(path: Path) -> tuple[Any, int]:
    """Return the header of a safetensors file and its length in bytes; (None, 0) where it has none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            return (json.loads(file.read(length)), length) if 0 < length <= path.stat().st_size - 8 else (None, 0)
        except ValueError:
            return None, 0


def _broken(folder: Path) -> list[Path]:
    """List the configs that are no JSON objects: some are passed over in silence by whoever loads the model."""
    return [path for path in sorted(folder.glob("*config.json")) if path.is_file() and _parsed(path) is None]


def _wrong_in_generation(path: Path) -> list[str]:
    """Return what generation_config.json holds of the wrong kind, which nobody checks before it is used."""
    found, wrong = _read(path), []
    for key in TOKENS:
        given = found.get(key)
        tokens = given if isinstance(given, list) else [] if given is None else [given]
        wrong += [f"{key} is {given!r}, not a token's number" for token in tokens if type(token) is not int][:1]
    for key in NUMBERS:
        given = found.get(key)
        if given is not None and (isinstance(given, bool) or not isinstance(given, int | float)):
            wrong.append(f"{key} is {given!r}, not a number")
    return [f"{path}: {each}" for each in wrong]


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
    """Read a JSON object; empty where there is none: `damage` says what is wrong with it."""
    return _parsed(path) or {}


def _parsed(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
