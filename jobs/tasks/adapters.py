"""Low-rank adapters that lie apart from the model they were trained on: where that is, and both made one.

    model/adapter_config.json, adapter_model.safetensors    as peft writes and reads them
          base.json                                         where the base is, and the digest of its weights
          config.json, what the task learned, tandem.json   as beside whole weights

Whoever loads such a folder gets the base with the adapters in its weights: what the merged export would have been.
"""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.tasks import TaskError
from tracking import model_store, weights_digest

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
PREFIX = "base_model.model."
"""What peft puts before the names of a model's parameters."""
FACTORS = (".lora_A.weight", ".lora_B.weight")
"""Ends of the names of what is added to the weight of a linear layer, in the files."""


@dataclass(frozen=True)
class Base:
    """The model that adapters were trained on."""

    at: str
    """A directory, what `model_store.portable` says of one in a store, or a hub id."""
    digest: str
    """SHA-256 (hex) of its weights (tracking/weights_digest.py), or the commit of a hub id."""

    def write(self, directory: Path) -> None:
        """Say so in a folder of adapters."""
        (directory / BASE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read(directory: Path | str) -> Base | None:
    """Return the base of a folder of adapters, as it says; None for any other folder, or a hub id.

    Raises:
        TaskError: it cannot be read.
    """
    path = Path(directory) / BASE
    if not (path.is_file() and (path.parent / CONFIG).is_file()):
        return None
    try:
        return Base(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise TaskError(f"{path} does not say which model the adapters belong to: {error}") from error


def base_of(directory: Path | str) -> Path | None:
    """Return the folder with the base of a folder of adapters, with the weights that it had; None for any other.

    Raises:
        TaskError: it is not there, or holds other weights.
    """
    base = read(directory)
    if base is None:
        return None
    folder = model_store.located(base.at)
    if folder is None:
        return _of_hub(base, directory)
    if not folder.is_dir():
        raise TaskError(
            f"{directory} holds adapters for the model in {folder}, which is not there on this machine: put that back "
            f"(a link will do), or train again with model.lora.merge: true, which needs no base"
        )
    _check_digest(str(directory), folder, base.digest, _state(folder))
    return folder


@cache
def _check_digest(directory: str, folder: Path, digest: str, state: tuple[tuple[str, int, int], ...]) -> None:
    """Compare the base's weights with what the adapters were trained on, once for each state of its files."""
    if weights_digest.of_folder(folder) != digest:
        raise TaskError(
            f"{directory} holds adapters for the model in {folder}, whose weights have changed since: bring it back as "
            f"it was (SHA-256 {digest[:12]})"
        )


def _state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def _of_hub(base: Base, directory: Path | str) -> Path:
    """Return this machine's copy of a model of the hub, at the commit that the adapters were trained on."""
    from huggingface_hub import snapshot_download

    wanted: dict[str, Any] = {"revision": base.digest, "allow_patterns": ["*.safetensors", "*.json"]}
    with suppress(Exception):  # the client's kinds of errors are many; what is not here is asked for below
        here = Path(snapshot_download(base.at, local_files_only=True, **wanted))
        if any(here.glob("*.safetensors")):
            return here
    try:
        return Path(snapshot_download(base.at, **wanted))
    except Exception as error:  # as above
        raise TaskError(
            f"{directory} holds adapters for {base.at} at commit {base.digest}, which cannot be had: {error}"
        ) from error


def put_on(model: Any, directory: Path) -> tuple[torch.nn.Module, set[str]]:
    """Add the adapters of a folder into a base's weights; return the model, and the weights that replace its own.

    Each weight is added to in fp32 and rounded once. Layers that share one with an adapted layer keep theirs.

    Raises:
        TaskError: they are of another model.
    """
    import peft
    from safetensors.torch import load_file

    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        factors = load_file(directory / WEIGHTS)
        settings = peft.LoraConfig.from_pretrained(str(directory))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied weights, which `untie` parts
            adapted = peft.get_peft_model(model, settings)
        found = peft.set_peft_model_state_dict(adapted, factors)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise TaskError(f"cannot put the adapters in {str(directory)!r} on their base: {error}") from error
    lacking = [name for name in found.missing_keys if ".lora_" in name or ".modules_to_save." in name]
    if lacking or found.unexpected_keys:
        wrong = f"{lacking[0]} is missing" if lacking else f"{found.unexpected_keys[0]} has no place"
        raise TaskError(f"the adapters in {str(directory)!r} are not those of {type(model).__name__}: {wrong}")
    merged = merge(adapted)
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(trains.get(name, True))
    return merged, {name.removeprefix(PREFIX) for name in factors if ".lora_" not in name}


def merge(adapted: torch.nn.Module) -> torch.nn.Module:
    """Add the adapters of a peft model into its weights, in place, and return the plain model.

    An adapter changes one layer. Where that layer shares its weight with another one (an embedding tied to the output
    head), the two part first: merged into the shared weight, the adapter would change both.
    """
    if untie(adapted):
        config = adapted.get_base_model().config  # type: ignore[operator]
        for each in (config, config.get_text_config()):
            each.tie_word_embeddings = False
    return adapted.merge_and_unload()  # type: ignore[operator]


def untie(adapted: torch.nn.Module) -> list[str]:
    """Give each adapted layer a weight of its own, where it shares one; return the names of those layers."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    parted = []
    for name, layer in adapted.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base, which = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
        weight: torch.nn.Parameter = getattr(base, which)
        others = (each for other in adapted.modules() if other is not base for each in other.parameters(recurse=False))
        if any(each is weight for each in others):
            setattr(base, which, torch.nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
            parted.append(name)
    return parted


def as_type(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Turn a model's weights, and the buffers that are saved with it, into a floating-point type, in place."""
    for tensor in model.state_dict(keep_vars=True).values():
        if hasattr(tensor, "is_floating_point") and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model
