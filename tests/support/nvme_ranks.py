"""One of two ranks that train a model at stage 3, save, resume and export it, with its state in memory or on NVMe.

python tests/support/two_ranks.py nvme_ranks FOLDER OFFLOAD-PRECISION[-parameters]…        those on NVMe too
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from cluster.errors import UserError
from jobs.checkpoint import catalog, resume
from jobs.checkpoint.catalog import Keep, Manifest
from jobs.checkpoint.resume import Fill
from jobs.checkpoint.saver import GroupNotes, Saver
from jobs.checkpoint.store import Store
from jobs.spec import TrainingSpec
from jobs.worker import async_io, deepspeed_internals, swap
from jobs.worker.deepspeed_engine import Engine
from jobs.worker.recorded import record
from jobs.worker.zero import deepspeed_config, with_swap_folder

STEPS, SAVED_AT, MICRO_BATCHES, WIDTH = 4, 2, 2, 800


class Wide(torch.nn.Module):
    """Three layers whose parts are large enough for files (1 MiB), one of them frozen; others' parts are not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, WIDTH)
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.base = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.second = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits (rows, 7) for ids (rows,)."""
        hidden = self.base(torch.tanh(self.first(self.embed(ids))))
        logits: torch.Tensor = self.head(torch.tanh(self.second(hidden)))
        return logits


def engine_of(training: TrainingSpec, place: Path | None, fill: Fill | None = None, sub_group_size: int = 1) -> Engine:
    """Make one, with the first weights or those of a checkpoint."""
    config = deepspeed_config(training, 1, MICRO_BATCHES, precision=training.precision, on_gpu=False)
    config["zero_optimization"]["sub_group_size"] = sub_group_size  # of the same size, norms are summed alike
    if place is not None:
        if config["zero_optimization"]["offload_optimizer"]["device"] == "nvme":
            async_io.ready()
        config = with_swap_folder(config, place)
    recorded = record(Wide, 0)
    engine = Engine(recorded.model, training, config, torch.device("cpu"), partial(_either, fill, recorded.fill))
    if fill is None:
        engine.make_exact(recorded.fill)
    return engine


def _either(saved: Fill | None, first: Fill, name: str, start: int, out: torch.Tensor) -> None:
    """Fill in what was saved, of what is trained, or the first weights."""
    (first if saved is None or name.startswith("base.") else saved)(name, start, out)


def step(engine: Engine, number: int, saver: Saver | None = None) -> None:
    """Take one, as the loop does: what is being saved is waited for before the optimizer changes it."""
    for micro in range(MICRO_BATCHES):
        ids = torch.tensor([(5 * number + 2 * micro + engine.rank) % 7])
        loss = torch.nn.functional.cross_entropy(engine.model(ids).float(), (ids + 1) % 7, reduction="sum")
        engine.backward(loss / 4)
        if micro + 1 == MICRO_BATCHES and saver is not None:
            saver.wait_copied()
            engine.all_sum(0.0)
        engine.step()
    assert 0 < engine.gradient_norm() < 100


def leave(engine: Engine, path: Path) -> None:
    """Write this rank's part of the training state."""
    found = {
        f"{kind}|{each.parameter}|{each.start}": tensor.clone()
        for each in engine.owned_fragments()
        for kind, tensor in each.tensors.items()
    }
    save_file(found, path)


def run(case: str, rank: int, folder: Path) -> None:
    """Train, save on the way, go on; begin again at what was saved, and go on from there."""
    offload, precision, *parameters = case.split("-")
    on_nvme = {"nvme_path": str(folder)} if offload == "nvme" or parameters else {}
    on_nvme |= {"offload_parameters": "nvme"} if parameters else {}
    training = TrainingSpec.model_validate(
        {"steps": STEPS, "global_batch_size": 4, "learning_rate": 0.01, "precision": precision}
        | {"deepspeed": {"zero_stage": 3, "offload": offload, **on_nvme}}
    )
    store = Store(str(folder / case))
    with swap.held(training, case, "first", rank) as place:
        engine = engine_of(training, place)
        assert engine.in_files == (offload == "nvme")
        if parameters:
            read_beside(engine, place)
            refuse(folder, place, rank)
        saver = Saver(store, case, rank, 2, Keep(), notes=GroupNotes())
        for number in range(STEPS):
            step(engine, number, saver)
            if number + 1 == SAVED_AT:
                manifest = Manifest(SAVED_AT, SAVED_AT, 2, 3, elements=engine.elements())
                saver.begin(manifest, engine.owned_fragments(), direct=engine.in_files)
        saver.finish()
        assert [outcome.error for outcome in saver.outcomes()] == [None]
        leave(engine, folder / f"{case}-unbroken-{rank}.safetensors")
        if (weights := engine.state_dict()) is not None:
            check_parts(engine, weights)
            save_file(
                {name: tensor.clone() for name, tensor in weights.items()}, folder / f"{case}-weights.safetensors"
            )
    dist.barrier()
    with swap.held(training, case, "second", rank) as place:
        assert not list((folder / f"tandem-{case}").glob("first-*"))
        saved, _ = catalog.newest_valid(store)
        assert saved is not None
        state = resume.reader(store, saved)

        def fill(name: str, start: int, out: torch.Tensor) -> None:
            whole = torch.empty(out.numel())
            state.read("weight", name, start, whole)
            out.copy_(whole)

        engine = engine_of(training, place, fill)
        engine.restore(state, saved.updates)
        for number in range(SAVED_AT, STEPS):
            step(engine, number)
        leave(engine, folder / f"{case}-resumed-{rank}.safetensors")
    dist.barrier()
    if offload == "nvme":
        fail_to_read(training, case, rank)


def read_beside(engine: Engine, place: Path | None) -> None:
    """Read another model of the same weights, whose files are its own."""
    assert place is not None
    recorded = record(Wide, 0)
    other = engine.divided(recorded.model, recorded.fill)
    assert [len(list(folder.iterdir())) for folder in place.glob("parameters-*")] == [3, 3]
    ids = torch.tensor([1, 2])
    with torch.no_grad():
        assert torch.equal(other(ids), engine.model(ids))
    engine.settle()


def refuse(folder: Path, place: Path | None, rank: int) -> None:
    """Have both ranks look at their nodes; there is room for the first one's files, and none for the second one's."""
    assert place is not None
    swap.check_nodes(place, swap.Files([], 1), 2, 2)
    try:
        swap.check_nodes(place, swap.Files([], 2 * 10**15 * rank), 2, 2)
    except UserError as error:
        (folder / f"refused-{rank}.txt").write_text(str(error))


def check_parts(engine: Engine, weights: dict[str, torch.Tensor]) -> None:
    """Hold this rank's parts, wherever they are, against the gathered weights."""
    for name, parameter in engine.model.module.named_parameters():
        start, mine = deepspeed_internals.part(parameter)
        assert mine.numel() > 0, name
        assert torch.equal(mine, weights[name].reshape(-1)[start : start + mine.numel()]), name


def fail_to_read(training: TrainingSpec, case: str, rank: int) -> None:
    """Learn from a gradient that cannot be read, since it lies between two blocks: the next loss is NaN, not wrong."""
    with swap.held(training, case, "third", rank) as place:
        engine = engine_of(training, place, sub_group_size=400_000)
        step(engine, 0)
        assert not math.isfinite(float(engine.model(torch.tensor([1])).sum()))
    dist.barrier()
