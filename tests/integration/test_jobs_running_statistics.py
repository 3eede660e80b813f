"""A model with batch normalisation that two ranks trained is the one that they evaluated, and the one that leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.tasks.image_classification import ImageClassification
from jobs.worker import buffers
from tests.support import two_ranks

PRECISIONS = ("fp32", "bf16")


def data(folder: Path) -> None:
    """Write 48 pictures whose brightness, like their label, depends on their place: the ranks see unlike ones."""
    generator = np.random.default_rng(0)
    lines = []
    for at in range(48):
        pixels = generator.integers(0, 60, (16, 16, 3)) + 12 * (at // 3)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{at}.png")
        lines.append(json.dumps({"image": str(folder / f"{at}.png"), "label": "bright" if at % 2 else "dark"}))
    (folder / "x.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have left, in each precision."""
    folder = tmp_path_factory.mktemp("norm")
    data(folder)
    values = {
        "name": "x",
        "phase": "pretrain",
        "task": "image-classification",
        "model": {"architecture": "resnet"},
        "data": {"train": "x.jsonl", "eval_fraction": 0.3},
        "training": {"steps": 4, "global_batch_size": 16, "learning_rate": 0.05},
    }
    (folder / "spec.json").write_text(json.dumps(values))
    two_ranks.run("norm_ranks", folder, PRECISIONS)
    return folder


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_two_ranks_evaluated_is_what_is_exported(precision: str, folder: Path) -> None:
    """The ranks have raised where the loss of the files was another one."""
    found = json.loads((folder / f"{precision}.json").read_text())
    assert any(found["differed"]), "the ranks have seen unlike rows"
    assert found["tracked"] == [4]
    loaded = ImageClassification.load(folder / precision).load_model(folder / precision)
    assert any(name.endswith("running_mean") and buffer.abs().sum() > 0 for name, buffer in loaded.named_buffers())


def test_models_that_learn_parameters_only_have_nothing_to_average() -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    plain.register_buffer("positions", torch.arange(4), persistent=False)
    assert buffers.learned(plain) == []
    assert buffers.said(plain, 2) == []
    normed = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    assert [key for _, key in buffers.learned(normed)] == ["running_mean", "running_var", "num_batches_tracked"]
    assert buffers.said(normed, 1) == []
    assert buffers.said(normed, 2)[0].startswith("BatchNorm1d: each worker normalises by the rows of its own")
