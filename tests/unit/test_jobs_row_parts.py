"""Rows that several ranks share: who has which, what a part is, and what is refused before a worker starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from cluster import specfile
from cluster.errors import UserError
from jobs import parents
from jobs.data import batches
from jobs.spec import JobSpec
from jobs.tasks import IGNORED, TaskError, packing, shared_rows
from jobs.worker import deepspeed_json, sequence
from tests.support import tiny_models

BASE = "{name: x, phase: pretrain, model: {architecture: llama}, data: {train: a.txt}, training: {steps: 5}}"
SHARED = "training.parallel.sequence=2"


def load(*overrides: str) -> JobSpec:
    return specfile.loads(BASE, JobSpec, overrides)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("world_size", [4, 8])
def test_ranks_of_a_group_see_the_same_rows_and_the_groups_all_of_a_step(parts: int, world_size: int) -> None:
    rows = batches.Order(100, 0).take(0, 13)
    seen: dict[int, list[np.ndarray]] = {}
    for rank in range(world_size):
        place = sequence.place(rank, world_size, parts)
        mine = np.concatenate(batches.share(rows, place.reader, place.readers, micro_batch=2))
        seen.setdefault(rank // parts, []).append(mine)
        assert place.part == rank % parts
    assert sorted(np.concatenate([group[0] for group in seen.values()])) == sorted(rows)
    assert all(np.array_equal(each, group[0]) for group in seen.values() for each in group)


def test_a_world_that_makes_no_whole_groups_is_refused() -> None:
    with pytest.raises(UserError, match="3 workers cannot be divided"):
        sequence.place(0, 3, 2)


@pytest.mark.parametrize(("workers", "parts", "whole"), [(5, 2, 4), (4, 2, 4), (3, 4, 4), (7, 1, 7), (0, 1, 1)])
def test_groups_are_whole(workers: int, parts: int, whole: int) -> None:
    assert batches.whole_groups(workers, parts) == whole


def packed(length: int) -> dict[str, torch.Tensor]:
    """Return a batch of two packed rows of `length` tokens."""
    pieces = [(list(range(size)), [IGNORED, *range(1, size)]) for size in (5, 3, 7, 2, 1, 4)]
    rows = packing.pack(pieces, length + 1, 0)
    return packing.packed_batch({name: column[:2] for name, column in rows.items()})


@pytest.mark.parametrize("length", [12, 13])
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_together_are_the_rows_padded_at_their_ends(length: int, parts: int) -> None:
    whole = packed(length)
    each = [shared_rows.part(whole, index, parts) for index in range(parts)]
    for name, filling in (("input_ids", 0), ("labels", IGNORED), ("position_ids", 0)):
        joined = torch.cat([part[name] for part in each], dim=1)
        assert len({part[name].shape for part in each}) == 1
        assert torch.equal(joined[:, :length], whole[name])
        assert (joined[:, length:] == filling).all()
    ends = each[0]["attention_mask"]
    assert ends.dtype == torch.int32
    assert ends.shape[:3] == (2, 1, 1)
    assert all(torch.equal(ends, part["attention_mask"]) for part in each)
    for of_row, positions in zip(ends[:, 0, 0].tolist(), whole["position_ids"], strict=True):
        begins = positions.eq(0).nonzero()[:, 0].tolist()
        assert {0, *(end for end in of_row if end < length)} == set(begins)


def test_rows_of_one_document_have_their_places_in_the_whole_row() -> None:
    ids = torch.arange(10).view(2, 5)
    second = shared_rows.part({"input_ids": ids, "labels": ids}, 1, 2)
    assert second["position_ids"].tolist() == [[3, 4, 0]] * 2
    assert second["attention_mask"].tolist() == [[[[6]]]] * 2


@pytest.mark.parametrize(
    ("heads", "shared", "parts", "repeats"), [(8, 8, 4, 1), (8, 4, 4, 1), (8, 2, 4, 2), (8, 1, 8, 8), (12, 4, 6, 3)]
)
def test_keys_are_repeated_no_more_than_it_takes(heads: int, shared: int, parts: int, repeats: int) -> None:
    assert sequence._repeats(heads, shared, parts) == repeats
    assert shared * repeats % parts == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((SHARED,), "training.parallel.sequence: .* and resources.workers, 1, is no multiple of 2"),
        ((SHARED, "resources.workers=3"), "resources.workers, 3, is no multiple"),
        ((SHARED, "resources.workers={min: 2, max: 5}"), "resources.workers.max, 5, is no multiple"),
        ((SHARED, "resources.workers={max: 4}"), "resources.workers.min, 1, is no multiple"),
        ((SHARED, "resources.workers=2", "task=image-classification"), "rows of task 'image-classification'"),
        ((SHARED, "resources.workers=2", "task.objective=orpo"), "pairs of objective 'orpo'"),
        (("training.parallel.sequence=0",), "greater than or equal to 1"),
    ],
)
def test_specs_that_cannot_be_are_refused_with_their_place(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(*overrides)


def test_how_rows_are_shared_is_no_part_of_what_is_learned() -> None:
    assert load(SHARED, "resources.workers={min: 2, max: 4}").digest() == load().digest()


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (
            "llama",
            {"num_attention_heads": 6, "hidden_size": 60},
            "has 6 attention heads, which must be a multiple of it: choose one of 2",
        ),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "of kind dynamic"),
        ("mistral", {"sliding_window": 63}, "see 63 tokens of a row's 64"),
        ("gemma3_text", {"sliding_window": 16}, "see 16 tokens"),
        ("mixtral", {"output_router_logits": True}, "balances its experts"),
        ("rwkv", {}, "has no attention heads"),
    ],
)
def test_models_that_cannot_be_divided_are_refused(kind: str, changes: dict[str, Any], said: str) -> None:
    config = AutoConfig.for_model(kind, **changes)
    with pytest.raises(TaskError, match=said):
        shared_rows.check_config(config, 4, 64)


@pytest.mark.parametrize(("kind", "changes"), [("mistral", {"sliding_window": 64}), ("qwen2", {}), ("mixtral", {})])
def test_models_that_can_are_not(kind: str, changes: dict[str, Any]) -> None:
    shared_rows.check_config(AutoConfig.for_model(kind, **changes), 4, 64)


def test_what_is_padded_is_said() -> None:
    assert "padded" not in sequence.said(2, 64)
    assert "row of 65 tokens, padded by 3: 17 on each" in sequence.said(4, 65)


def test_a_job_is_refused_for_its_model_before_anything_starts(tmp_path: Path) -> None:
    spec = load("training.parallel.sequence=3", "resources.workers=3", "model.config={num_attention_heads: 4}")
    with pytest.raises(TaskError, match="has 4 attention heads"):
        parents.check_architecture(spec, tmp_path)
    parent = tiny_models.language_model(tmp_path / "parent")
    with pytest.raises(TaskError, match="has 4 attention heads"):
        parents.check_folder(spec, str(parent), parent, tmp_path)


@pytest.mark.parametrize("key", ["sequence_parallel_size", "tensor_parallel"])
def test_a_deepspeed_json_shares_nothing_on_its_own(tmp_path: Path, key: str) -> None:
    (tmp_path / "ds.json").write_text(f'{{"{key}": 2}}')
    said = "training.parallel.sequence" if "sequence" in key else "AutoTP cuts layers up"
    with pytest.raises(UserError, match=f"{key}.*{said}"):
        deepspeed_json.read(tmp_path / "ds.json")
