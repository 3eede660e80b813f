"""Trained weights → one directory in the Hugging Face layout, checked by loading and measuring it."""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from cluster.errors import UserError
from cluster.precision import Precision
from jobs.checkpoint import resume
from jobs.spec import LoraSpec
from jobs.tasks import Task, adapters
from jobs.worker.lora import add_lora
from jobs.worker.weight_stream import SHARD_BYTES

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}

ROUNDING: dict[Precision, float] = {"bf16": 2**-7, "fp32": 2**-16}
"""How far, as a share, the loss of the files may lie from that of the trained model.

An error of d in every logit moves a row's loss L by at most 2·d·min(1, L), and errors of rounding have mixed signs. In
fp32 only the order of sums and the merging of adapters differ, d about 2⁻²⁴ times logits of up to some hundreds. In
bf16 the merged weights are rounded to 8 bits, and where the training had fp32 weights (ZeRO stage 0) all of them are:
d about 2⁻⁸ times logits of a few. Measured on random decoders, adapted and not: at most 1e-7 and 1.2e-3.
"""
LEAST: dict[Precision, float] = {"bf16": 1e-3, "fp32": 1e-5}
"""A difference below it is none, however small the loss."""


class WrongExport(UserError):
    """The files that were written do not hold the model that was trained."""

    exit_code = 1


class NotWritten(OSError):
    """A disk does not take the model, and every rank has been told: they may go on with something else together."""


@contextmanager
def together() -> Iterator[None]:
    """Have one rank do by itself what it does to files; the others wait for it. Collective; nothing within is.

    Raises:
        NotWritten: on every rank, where one got an OSError, or what safetensors makes of one.
    """
    failed = None
    try:
        yield
    except OSError as error:
        failed = (error.errno, error.strerror or str(error), error.filename)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        failed = (int(number[1]), str(error), None)
    told = [each for each in resume.gathered(failed) if each is not None]
    if told:
        raise NotWritten(*told[0])


def export(
    directory: Path,
    task: Task,
    weights: dict[str, torch.Tensor],
    fresh_model: Callable[[], torch.nn.Module],
    precision: Precision,
    lora: LoraSpec | None,
    check: Callable[[Path], None],
) -> None:
    """Write the model directory: safetensors, config, and what the task learned; adapters are merged.

    Args:
        weights: each in its whole shape, on the CPU.
        fresh_model: makes the model that they belong to.
        check: is given the written directory under a name that nobody else reads, and raises if it is wrong; then
            nothing is left of it.

    Raises:
        WrongExport: the files do not load back to the weights that were written.
    """
    with aside(directory, True, name_aside(directory)) as partial:
        _write(partial, task, weights, fresh_model, precision, lora)
        check(partial)


def name_aside(directory: Path) -> str:
    """Return a new name for what is to become `directory`."""
    return f".{directory.name}.{secrets.token_hex(4)}.partial"


@contextmanager
def aside(directory: Path, first: bool, name: str) -> Iterator[Path]:
    """Yield a folder beside `directory` that takes its place at the end; of one that fails nothing is left.

    Args:
        first: makes and moves it; of several ranks that write it, one.
        name: the same on all.
    """
    partial = directory.with_name(name)
    if first:
        for left in directory.parent.glob(f".{directory.name}*.partial"):  # of attempts before this one
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if first:
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)


@contextmanager
def on_all_nodes(written: Path, first: bool, *, copies: bool) -> Iterator[None]:
    """Have what the first rank has written into a folder on the nodes that do not see it, meanwhile. Collective.

    Args:
        copies: each node has a folder of its own; then nothing large is in this one.
    """
    if not copies:
        yield
        return
    files = [path for path in written.rglob("*") if path.is_file()] if first else []
    told = resume.gathered({str(path.relative_to(written)): path.read_bytes() for path in files})[0]
    own = not written.is_dir()  # of several ranks of a node each may find so: they write the same
    for name, content in told.items() if own else ():
        path = written / name
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        aside.write_bytes(content)
        aside.replace(path)
    torch.distributed.barrier()
    try:
        yield
    finally:
        if own:
            shutil.rmtree(written, ignore_errors=True)


def _write(
    directory: Path,
    task: Task,
    weights: dict[str, torch.Tensor],
    fresh_model: Callable[[], torch.nn.Module],
    precision: Precision,
    lora: LoraSpec | None,
) -> None:
    model = fresh_model()
    if lora is not None:
        wrapped = add_lora(model, lora)
        wrapped.load_state_dict(weights)
        wrapped.save_pretrained(str(directory / "adapter"))  # type: ignore[operator]
        model = adapters.merge(wrapped)
    else:
        model.load_state_dict(weights)
    save(model.to(DTYPES[precision]), directory)
    task.save(directory)
    loaded = task.load_model(directory).state_dict()
    for name, tensor in model.state_dict().items():
        if name not in loaded or not torch.equal(loaded[name], tensor):
            raise WrongExport(f"{directory}: {name} does not load back as it was written")


def save(model: torch.nn.Module, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model's weights, in files of at most `shard_bytes`, its config and its generation config as they are.

    transformers reads a generation config with a temperature and no sampling, as published models have them, but
    refuses to write it.
    """
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        model.generation_config = type(generation)()
    model.save_pretrained(str(directory), max_shard_size=shard_bytes)  # type: ignore[operator]
    if generation is not None:
        model.generation_config = generation
        generation.to_json_file(directory / "generation_config.json")


def check_loss(trained: float, written: float, precision: Precision, rows: str) -> None:
    """Compare the loss of the trained model with that of its files, on the same rows.

    Args:
        rows: what they were measured on, for the message.

    Raises:
        WrongExport: they differ by more than rounding.
    """
    if abs(written - trained) <= LEAST[precision] + ROUNDING[precision] * abs(trained):
        return
    raise WrongExport(
        f"the exported model is not the one that was trained: its loss on {rows} is {written:.6g} from the files, and "
        f"was {trained:.6g} before. No model is left; the last checkpoint stays. This is a fault of the task's model "
        "or of the layers chosen in model.lora, not of the data"
    )
