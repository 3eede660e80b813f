"""One of two ranks that train a tiny model on real DeepSpeed engines, one for each case, and save what they hold.

python tests/support/two_ranks.py zero_ranks FOLDER STAGE-PRECISION[-unclipped|-muon|-layers[-selective]|-OWN]…

Where FOLDER holds a file named as a case with `.json` after it, that is the case's DeepSpeed JSON, STAGE included.
With Muon they go on from what they have saved, too: as if nothing had been between. `layers` is a model of which they
can be computed again. It is looked at before its first step, as a job's is: at stage 3, some weights are there in the
first pass then that are gathered in the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.checkpoint import resume
from jobs.checkpoint.catalog import Keep, Manifest
from jobs.checkpoint.saver import GroupNotes, Saver
from jobs.checkpoint.store import Store
from jobs.spec import TrainingSpec
from jobs.worker import setup, start, untaught
from jobs.worker.deepspeed_engine import Engine
from jobs.worker.recorded import record
from jobs.worker.zero import deepspeed_config, read_named

STEPS = 3


class Tiny(torch.nn.Module):
    """An odd number of elements everywhere, a frozen parameter, and one with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 5)
        self.frozen = torch.nn.Linear(5, 5)
        self.body = torch.nn.Linear(5, 5)
        self.head = torch.nn.Linear(5, 7)
        self.frozen.requires_grad_(False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits (rows, 7) for ids (rows,)."""
        hidden: torch.Tensor = self.head(torch.tanh(self.body(self.frozen(self.embed(ids)))))
        return hidden


class Deeper(Tiny):
    """With hidden layers of other shapes: as many matrices for Muon as two ranks do not share evenly."""

    def __init__(self) -> None:
        super().__init__()
        head = self.head
        del self.head
        self.wide, self.narrow = torch.nn.Linear(5, 9), torch.nn.Linear(9, 5)
        self.head = head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits (rows, 7) for ids (rows,)."""
        hidden = torch.tanh(self.body(self.frozen(self.embed(ids))))
        logits: torch.Tensor = self.head(hidden + self.narrow(torch.tanh(self.wide(hidden))))
        return logits


def layers() -> LlamaForCausalLM:
    """Build a language model of two layers."""
    sizes = {"vocab_size": 7, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).train()


MODELS = {"muon": Deeper, "layers": layers}
"""By a case's first word; others train `Tiny`."""


def run(case: str, rank: int, folder: Path) -> None:
    """Train and save below `folder`/`case`."""
    stage, precision, *more = case.split("-")
    own, muon = (folder / f"{case}.json").exists(), "muon" in more
    training = TrainingSpec.model_validate(
        {
            "steps": STEPS,
            "global_batch_size": 2,
            "learning_rate": 0.05,
            "precision": precision,
            "clip": 0.0 if "unclipped" in more else 1.0,
            "optimizer": "muon" if muon else "adamw",
            "gradient_checkpointing": "selective" if "selective" in more else False,
            "deepspeed": f"{case}.json" if own else {"zero_stage": int(stage)},
        }
    )
    base = read_named(training, folder)
    config = deepspeed_config(training, 1, 1, precision=training.precision, on_gpu=False, base=base)
    if stage == "3" and not own:
        config["zero_optimization"] |= {"sub_group_size": 30}  # several, as large models have
    begin = partial(_begin, MODELS.get("".join(more[:1]), Tiny), training, config)
    engine = begin(None)
    begun = {f"{each.parameter}|{each.start}": each.tensors["weight"].clone() for each in engine.owned_fragments()}
    save_file(begun, folder / f"{case}-{rank}.safetensors")
    if "layers" in more:
        with torch.no_grad():
            engine.model.module(torch.tensor([[1, 2]]))
    for step in range(STEPS):
        take_step(engine, step, rank)
    notes = GroupNotes()
    store = Store(str(folder / case))
    saver = Saver(store, case, rank, 2, Keep(), notes=notes)
    saver.begin(Manifest(STEPS, STEPS, 2, int(stage), elements=engine.elements()), engine.owned_fragments())
    saver.finish()
    (outcome,) = saver.outcomes()
    assert outcome.error is None, f"{case}: {outcome.error}"
    if muon:
        take_step(engine, STEPS, rank)
        again = begin(store)
        take_step(again, STEPS, rank)
        for expected, found in zip(engine.owned_fragments(), again.owned_fragments(), strict=True):
            for kind, tensor in expected.tensors.items():
                assert torch.equal(tensor, found.tensors[kind]), f"{case}: {kind} of {expected.parameter} goes on"
    if "layers" in more:
        return
    spoil(engine, on_this_rank=rank == 0)
    assert not math.isfinite(engine.gradient_norm()), f"{case}: rank {rank} does not see that a gradient is NaN"
    dist.barrier()


def _begin(
    build: Callable[[], torch.nn.Module], training: TrainingSpec, config: dict[str, Any], store: Store | None
) -> Engine:
    """Return an engine that begins, or goes on from what is in `store`, as a job does."""
    recorded = record(build, 0)
    begun = start.Start(recorded.model, recorded.fill)
    point = resume.agree(store) if store else resume.Point("begins")
    return setup.make_engine(begun, training, config, torch.device("cpu"), store or Store("/nowhere"), point)


def take_step(engine: Engine, step: int, rank: int) -> None:
    """Take a step of one row on each rank."""
    ids = torch.tensor([(3 * step + rank) % 7])
    out = engine.model(ids) if isinstance(engine.model.module, Tiny) else engine.model(ids.view(1, 1)).logits[0]
    loss = torch.nn.functional.cross_entropy(out.float(), (ids + 1) % 7, reduction="sum")
    assert untaught.remarks(loss, engine.model.module) == []
    engine.backward(loss / 2)
    engine.step()
    assert 0 < engine.gradient_norm() < 100


def spoil(engine: Engine, *, on_this_rank: bool) -> None:
    """Take a step of a finite loss whose gradient is NaN, by one rank's fault."""
    loss = engine.model(torch.tensor([1])).float().sum()
    if on_this_rank:
        loss = loss + torch.sqrt(loss * 0.0)
    assert math.isfinite(loss.item())
    engine.backward(loss)
    engine.step()
