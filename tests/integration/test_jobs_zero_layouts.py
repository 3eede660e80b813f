"""What checkpoints hold at every ZeRO stage, written by real DeepSpeed engines on two ranks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.errors import UserError
from jobs.checkpoint import catalog
from jobs.checkpoint.shards import MUON, Reader
from jobs.checkpoint.store import Store
from jobs.spec import TrainingSpec
from jobs.worker import optimizers, zero_layouts
from jobs.worker.muon import Matrix, MuonAndAdamW
from jobs.worker.recorded import record
from tests.support import two_ranks, zero_ranks

CASES = ("0-fp32", "1-fp32", "2-fp32", "3-fp32", "0-bf16", "1-bf16", "2-bf16", "3-bf16")
UNCLIPPED = ("0-fp32-unclipped", "2-fp32-unclipped")
OWN = {
    "0-fp32-sums": {"communication_data_type": "fp32", "zero_allow_untested_optimizer": False},
    "1-fp32-plain": {"zero_optimization": {"stage": 1, "contiguous_gradients": False, "reduce_scatter": False}},
    "1-fp32-aligned": {"zero_optimization": {"stage": 1, "parameter_alignment": True, "round_robin_gradients": True}},
    "2-fp32-aligned": {
        "zero_optimization": {"stage": 2, "parameter_alignment": True, "round_robin_gradients": True}
        | {"use_multi_rank_bucket_allreduce": False, "ignore_unused_parameters": False, "overlap_comm": True}
        | {"reduce_bucket_size": 8, "allgather_bucket_size": 16},
    },
    "2-fp32-offloaded": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "2-bf16-sums": {"communication_data_type": "fp32", "zero_optimization": {"stage": 2}},
    "3-fp32-defaults": {"zero_optimization": {"stage": 3}},
    "3-fp32-reduced": {
        "zero_optimization": {"stage": 3, "reduce_scatter": False, "contiguous_gradients": False, "overlap_comm": False}
        | {"stage3_use_all_reduce_for_fetch_params": True, "memory_efficient_linear": False, "sub_group_size": 30}
        | {"stage3_param_persistence_threshold": 10, "stage3_model_persistence_threshold": 10},
    },
    "3-fp32-leaves": {
        "zero_optimization": {"stage": 3, "allgather_sequential": True, "enable_sanity_checks": True}
        | {"leaf_module": {"names": ["body"]}, "log_trace_cache_warnings": True, "stage3_max_live_parameters": 0}
        | {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 8},
    },
    "3-fp32-offloaded": {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
        "disable_python_gc": True,
        "log_level": "info",
        "steps_per_print": 2,
    },
}
"""DeepSpeed JSONs that are let through."""
SIZES = {"embed.weight": 35, "body.weight": 25, "body.bias": 5, "head.bias": 7}
MUON_CASES = ("0-fp32-muon", "1-fp32-muon", "2-fp32-muon", "3-fp32-muon", "1-bf16-muon", "3-bf16-muon")
LAYERS_CASES = ("3-fp32-layers", "3-fp32-layers-selective", "1-bf16-layers", "1-bf16-layers-selective")
MATRICES = {"body.weight": 25, "wide.weight": 45, "narrow.weight": 45}
WITH_MUON = {**SIZES, **MATRICES, "wide.bias": 9, "narrow.bias": 5}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each case, by two ranks that train one after the other; they check the gradients' norms."""
    folder = tmp_path_factory.mktemp("zero")
    for case, content in OWN.items():
        (folder / f"{case}.json").write_text(json.dumps(content))
    two_ranks.run("zero_ranks", folder, [*CASES, *UNCLIPPED, *MUON_CASES, *LAYERS_CASES, *OWN], timeout_s=600)
    return folder


def state(folder: Path, case: str, sizes: dict[str, int] = SIZES) -> dict[tuple[str, str], torch.Tensor]:
    store = Store(str(folder / case))
    manifest, skipped = catalog.newest_valid(store)
    assert manifest is not None
    assert skipped == []
    assert manifest.elements == sizes, "frozen parameters and second names are no part of it"
    reader = Reader(store, [f"{catalog.folder(manifest.step)}/{name}" for name in manifest.shards])
    found = {(kind, name): torch.zeros(numel) for name, numel in sizes.items() for kind in reader.kinds(name)}
    for (kind, name), out in found.items():
        reader.read(kind, name, 0, out)
    return found


@pytest.mark.parametrize("case", [*CASES[1:], *OWN])
def test_every_layout_holds_what_training_without_zero_holds(saved: Path, case: str) -> None:
    expected, found = state(saved, "0-fp32"), state(saved, case)
    # fp32 sums in another order; bf16 rounds to 2^-9 at each of a dozen products. In norms: AdamW's first steps go by a
    # gradient's sign, so a single element whose gradient is all but zero may well be a step's length away.
    tolerance = 1e-5 if "fp32" in case else 0.05
    for key, tensor in found.items():
        assert float(expected[key].norm()) > 0
        assert float((tensor - expected[key]).norm() / expected[key].norm()) < tolerance, key


def by_one_process() -> dict[tuple[str, str], torch.Tensor]:
    """Train the same without ranks and without DeepSpeed: both rows in one process, clipped by torch."""
    model = record(zero_ranks.Deeper, 0).materialise()
    training = TrainingSpec.model_validate({"steps": zero_ranks.STEPS, "learning_rate": 0.05, "optimizer": "muon"})
    matrices = optimizers.matrices_of(model)
    optimizer = optimizers.make(model, training, matrices, torch.float32, torch.device("cpu"))
    assert isinstance(optimizer, MuonAndAdamW)
    assert matrices == MATRICES.keys()
    weights = dict(model.named_parameters())
    optimizer.lay_out({weights[name]: [Matrix(*weights[name].shape, 0, (size,))] for name, size in MATRICES.items()})
    for step in range(zero_ranks.STEPS):
        ids = torch.tensor([(3 * step) % 7, (3 * step + 1) % 7])
        torch.nn.functional.cross_entropy(model(ids), (ids + 1) % 7).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    states = {name: {"weight": weights[name], **optimizer.state[weights[name]]} for name in WITH_MUON}
    return {(kind, name): found.detach().view(-1) for name, kinds in states.items() for kind, found in kinds.items()}


@pytest.mark.parametrize("case", MUON_CASES)
def test_with_muon_every_stage_holds_what_one_process_holds(saved: Path, case: str) -> None:
    """And each has gone on from its checkpoint bit by bit (tests/support/zero_ranks.py)."""
    expected, found = by_one_process(), state(saved, case, WITH_MUON)
    tolerance = 1e-5 if "fp32" in case else 0.1
    assert {name for kind, name in found if kind == "momentum"} == MATRICES.keys()
    assert {kind for kind, name in found if name in MATRICES} == set(MUON)
    for key, tensor in found.items():
        assert float(expected[key].norm()) > 0
        assert float((tensor - expected[key]).norm() / expected[key].norm()) < tolerance, key


@pytest.mark.parametrize("case", LAYERS_CASES[::2])
def test_selective_checkpointing_changes_no_bit_though_weights_are_gathered_again(saved: Path, case: str) -> None:
    expected, found = (Store(str(saved / name)) for name in (case, f"{case}-selective"))
    shards = [list(catalog.newest_valid(store)[0].files.values()) for store in (expected, found)]  # type: ignore[union-attr]
    assert len(shards[0]) == 2
    assert [file.sha256 for file in shards[0]] == [file.sha256 for file in shards[1]]


def begun(folder: Path, case: str) -> dict[str, torch.Tensor]:
    """Return the master weights before the first step, flat, from both ranks' parts."""
    found = {name: torch.full((numel,), torch.nan) for name, numel in SIZES.items()}
    for rank in range(2):
        for key, part in load_file(folder / f"{case}-{rank}.safetensors").items():
            name, _, start = key.partition("|")
            found[name][int(start) : int(start) + part.numel()] = part
    return found


@pytest.mark.parametrize("case", [*CASES[1:], *OWN])
def test_the_first_weights_are_the_same_at_every_stage_bit_by_bit(saved: Path, case: str) -> None:
    """At stage 3 no rank has ever had a whole parameter, and in bf16 the masters are not rounded."""
    expected, found = begun(saved, "0-fp32"), begun(saved, case)
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name
        assert float(weight.std()) > 0.05


def test_an_optimizer_without_a_known_layout_is_named() -> None:
    class MiCS_Optimizer:
        pass

    with pytest.raises(UserError, match=r"ZeRO stage 3 with DeepSpeed's MiCS_Optimizer is no layout .*stage 0 with Ad"):
        zero_layouts.choose(3, MiCS_Optimizer())


def test_state_that_lies_elsewhere_is_refused_before_training() -> None:
    """As with optimizer states on NVMe, where the partitions in memory are empty."""
    with pytest.raises(UserError, match=r"of its elements, w has 4 of 9; v has 0 of 3; its checkpoints would not be"):
        zero_layouts.check_sums({"w": 4, "u": 1}, {"w": 9, "u": 1, "v": 3}, "ZeRO stage 3 with DeepSpeed's X")
