"""What a spec leaves out is as the model has it that the job starts from, and what it says holds.

A checked spec has every option, given or not, so these tests go by way of one: options of their own would tell nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.spec import JobSpec
from jobs.tasks import Task, TaskError, get

IMAGE = np.zeros((8, 8, 1), np.uint8)
OBJECTS = [{"bbox": [1, 1, 4, 4], "category": "a"}]
PAIRS = [{"source": "one two", "target": "un deux"}] * 4
TRAINED: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "object-detection": (
        [{"image": IMAGE, "objects": OBJECTS}],
        {"score_threshold": 0.1, "max_detections": 7},
    ),
    "image-embedding": (
        [{"image": IMAGE, "label": name} for name in "ab"],
        {"loss": "triplet", "margin": 0.7},
    ),
    "gan": ([{"image": IMAGE}], {"latent_size": 5}),
    "seq2seq": (PAIRS, {"prefix": "go: ", "max_target_length": 9, "tokenizer": {"train": "bpe", "vocab_size": 300}}),
}


def spec_options(name: str, phase: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's options as a job has them."""
    data = {"predict": {"predict": "x.jsonl"}, "evaluate": {"eval": "x.jsonl"}, "finetune": {"train": "x.jsonl"}}[phase]
    training = {"training": {"steps": 1}} if phase == "finetune" else {}
    whole = {"name": "x", "phase": phase, "task": {"name": name, **options}, "model": {"from": "parent"}, "data": data}
    return JobSpec.model_validate({**whole, **training}).task.options


def parent(name: str, folder: Path) -> Task:
    examples, options = TRAINED[name]
    task = get(name)(options)
    task.fit(task.observe(examples))
    task.save(folder)
    return task


def settings(task: Any) -> dict[str, Any]:
    """Return what a task does as it was told, beside what it learned of the data."""
    kept = ("score_threshold", "max_detections", "objective", "latent_size", "prefix", "max_target_length")
    return {key: getattr(task, key) for key in kept if hasattr(task, key)}


@pytest.mark.parametrize("phase", ["finetune", "evaluate", "predict"])
@pytest.mark.parametrize("name", TRAINED)
def test_what_a_spec_leaves_out_is_the_parents(name: str, phase: str, tmp_path: Path) -> None:
    trained = parent(name, tmp_path)
    assert settings(trained) != settings(get(name)())  # it was told other things than by default
    child = get(name)(spec_options(name, phase, {}))
    assert child.inherit(tmp_path)
    assert settings(child) == settings(trained)
    (tmp_path / "again").mkdir()
    child.save(tmp_path / "again")
    assert settings(get(name).load(tmp_path / "again", child.options)) == settings(trained)


@pytest.mark.parametrize(("name", "given", "expected"), [
    ("object-detection", {"score_threshold": 0.3}, {"score_threshold": 0.3, "max_detections": 7}),
    ("image-embedding", {"loss": "arcface"}, {"objective": {"loss": "arcface", "margin": None, "scale": 16.0}}),
    ("image-embedding", {"margin": 0.1}, {"objective": {"loss": "triplet", "margin": 0.1, "scale": 16.0}}),
    ("seq2seq", {"prefix": ""}, {"prefix": "", "max_target_length": 9}),
])  # fmt: skip
def test_what_a_spec_says_holds(name: str, given: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    parent(name, tmp_path)
    child = get(name)(spec_options(name, "finetune", given))
    child.inherit(tmp_path)
    assert settings(child) == expected


def test_what_has_no_effect_on_the_parents_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="scale is what loss arcface multiplies"):
        get("image-embedding")({"loss": "triplet", "scale": 3})
    parent("image-embedding", tmp_path)
    with pytest.raises(TaskError, match="which the model that the job starts from has"):
        get("image-embedding")(spec_options("image-embedding", "finetune", {"scale": 3})).inherit(tmp_path)
    parent("gan", tmp_path)
    with pytest.raises(TaskError, match=r"latent_size is 64, but the model it starts from has 5"):
        get("gan")(spec_options("gan", "finetune", {"latent_size": 64})).inherit(tmp_path)
