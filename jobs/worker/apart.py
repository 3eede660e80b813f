"""Adapters kept apart from their base (model.lora.merge: false): written, read back, and read in parts.

What is written is small, so it is the same at every ZeRO stage: gathered a parameter at a time, and written by rank 0.
The proof is that of other exports: base and adapters are loaded from the files, in parts where the training is, and
measured.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from cluster.errors import UserError
from jobs.checkpoint.resume import Fill
from jobs.tasks import adapters
from jobs.worker import buffers, export_in_parts
from jobs.worker.lora import Adapter
from tracking import model_store

BLOCK = 1 << 22
"""So many elements of what is added are made at a time."""
OTHER_SUMS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""Entries of an adapter's config by which more is added than alpha / rank · B A."""


def check(model: torch.nn.Module, parent: Path) -> None:
    """Refuse what cannot be told apart from its base afterwards.

    Args:
        parent: the folder of the base, or a hub id, which this machine has loaded.

    Raises:
        UserError: the model has running statistics, which a base would lack; or the base's commit is not known.
    """
    kinds = sorted({type(each).__name__ for each in model.modules() if buffers.counts(each)})
    if kinds:
        raise UserError(
            f"model.lora.merge: false keeps what is trained apart from its base, and the running statistics of "
            f"{', '.join(kinds)} change in the base itself: leave merge out, so that one whole model is written"
        )
    if not parent.is_absolute():
        base(parent, "")


def base(parent: Path, noted: str) -> adapters.Base:
    """Return what the files say of the model that a job starts from.

    Args:
        noted: the digest of its weights when the run began; "" where it is not known.

    Raises:
        UserError: its commit on the hub is not known.
    """
    from jobs import lineage

    digest = noted or lineage.weights_digest(parent)
    if not digest:
        raise UserError(
            f"model.lora.merge: false names the base by its commit, and that of {parent} is not known on this machine: "
            "leave merge out, or name a folder as model.from"
        )
    return adapters.Base(model_store.portable(parent), digest)


def save(directory: Path, live: torch.nn.Module, of: adapters.Base | None) -> None:
    """Write the adapters and what is trained whole, with the name of their base. Collective.

    Args:
        of: None on ranks that write nothing.

    Raises:
        OSError: what was written is not what is read.
    """
    found = export_in_parts.trained(live, of is not None)
    if of is None:
        return
    settings = live.peft_config["default"]  # type: ignore[union-attr, index]
    settings.base_model_name_or_path = of.at
    settings.revision = None if Path(of.at).is_absolute() else of.digest
    live.save_pretrained(str(directory), state_dict=dict(found), save_embedding_layers=False)  # type: ignore[operator]
    of.write(directory)
    written = load_file(directory / adapters.WEIGHTS)
    expected = {_in_file(name): tensor for name, tensor in found.items()}
    for name in sorted(written.keys() | expected.keys()):
        if name not in written or name not in expected or not torch.equal(written[name], expected[name]):
            raise OSError(f"{directory / adapters.WEIGHTS}: {name} does not read back as it was written")


def _in_file(name: str) -> str:
    """Return what peft calls a trained parameter in its files. Pure."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")


def put_back(live: torch.nn.Module, directory: Path) -> None:
    """Give an adapted model what was trained of another, from its files.

    Raises:
        UserError: the files are not of such a model.
    """
    tensors = load_file(directory / adapters.WEIGHTS)
    for name, parameter in live.named_parameters():
        if parameter.requires_grad:
            if (found := tensors.pop(_in_file(name), None)) is None or found.shape != parameter.shape:
                raise UserError(f"{directory / adapters.WEIGHTS} lacks {name}")
            parameter.data.copy_(found)
    if tensors:
        raise UserError(f"{directory / adapters.WEIGHTS}: {min(tensors)} has no place")


def save_config(live: torch.nn.Module, dtype: torch.dtype, directory: Path) -> None:
    """Write the config and the generation config of the model that has the adapters."""
    model = live.get_base_model()  # type: ignore[operator]
    described = copy.copy(model)
    described.config = copy.deepcopy(model.config)
    export_in_parts.save_config(described, dtype, directory)


def laid_over(plain: Fill, model: torch.nn.Module, directory: Path) -> Fill | str:
    """Return what fills in slices of a base with the adapters of a folder added, or why it has to be loaded whole.

    Args:
        plain: fills in slices of the base's parameters, by the names that `model` has.
        model: on the meta device, without adapters.
    """
    found = _factors(load_file(directory / adapters.WEIGHTS), model, directory)
    if isinstance(found, str):
        return found
    added, replaced = found

    def fill(name: str, start: int, out: torch.Tensor) -> None:
        if name in replaced:
            out.copy_(replaced[name].view(-1)[start : start + out.numel()])
        elif name not in added:
            plain(name, start, out)
        else:
            _fill_adapted(plain, added[name], model.get_parameter(name).shape[1], name, start, out)

    return fill


def _fill_adapted(plain: Fill, adapter: Adapter, columns: int, name: str, start: int, out: torch.Tensor) -> None:
    """Fill in a slice [n] of an adapted weight of so many columns: what is there, plus the adapter, in fp32."""
    for at in range(0, out.numel(), BLOCK):
        count = min(BLOCK, out.numel() - at)
        begin, end = start + at, start + at + count
        values = torch.empty(count, dtype=torch.float32)
        plain(name, begin, values)
        first = begin // columns
        rows = adapter.added(slice(first, -(-end // columns)))
        out[at : at + count].copy_(values + rows.reshape(-1)[begin - first * columns : end - first * columns])


def _factors(
    tensors: Mapping[str, torch.Tensor], model: torch.nn.Module, directory: Path
) -> tuple[dict[str, Adapter], dict[str, torch.Tensor]] | str:
    """Sort what a file of adapters holds: by the parameters that are added to, and those that are replaced."""
    from transformers.pytorch_utils import Conv1D

    settings = json.loads((directory / adapters.CONFIG).read_text(encoding="utf-8"))
    if wrong := next(
        (key for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if settings.get(key)), None
    ):
        return f"its adapters have {wrong}"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        owners.setdefault(id(parameter), []).append(name)
    added: dict[str, Adapter] = {}
    replaced: dict[str, torch.Tensor] = {}
    down_end, up_end = adapters.FACTORS
    for key, tensor in tensors.items():
        name = key.removeprefix(adapters.PREFIX)
        if name in parameters:
            replaced[name] = tensor
        elif name.endswith(down_end):
            module = name.removesuffix(down_end)
            weight = f"{module}.weight"
            if weight not in parameters or len(owners[id(parameters[weight])]) > 1:
                return f"{module} has an adapter, and no weight of its own"
            transposed = isinstance(model.get_submodule(module), Conv1D)
            up = tensors[key.removesuffix(down_end) + up_end]
            added[weight] = Adapter(tensor, up, settings["lora_alpha"] / settings["r"], transposed)
        elif not name.endswith(up_end):
            return f"{name} has an adapter that is no product of two matrices"
    return added, replaced
