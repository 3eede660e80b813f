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
USERS = [{"user": "u", "item": ["a", "b", "c"], "time": [1, 2, 3], "stars": [1, 4, 5]}]
TABLE = [{"age": at, "zip": str(at % 3), "id": f"r{at}", "target": at % 2} for at in range(60)]
STEPS = [{"x": at, "y": -at, "steer": at / 3, "brake": 1 - at} for at in range(9)]
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
    "recommendation": (USERS, {"softmax": "in-batch", "negatives": 7, "negatives_seed": 3, "max_length": 4}),
    "seq2seq": (PAIRS, {"prefix": "go: ", "max_target_length": 9, "tokenizer": {"train": "bpe", "vocab_size": 300}}),
}


def spec_options(name: str, phase: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's options as a job has them."""
    data = {"predict": {"predict": "x.jsonl"}, "evaluate": {"eval": "x.jsonl"}, "finetune": {"train": "x.jsonl"}}[phase]
    training = {"training": {"steps": 1}} if phase == "finetune" else {}
    whole = {"name": "x", "phase": phase, "task": {"name": name, **options}, "model": {"from": "parent"}, "data": data}
    return JobSpec.model_validate({**whole, **training}).task.options


def parent(name: str, folder: Path) -> Task:
    return trained_with(name, folder, *TRAINED[name])


def trained_with(name: str, folder: Path, examples: list[dict[str, Any]], options: dict[str, Any]) -> Task:
    task = get(name)(options)
    task.fit(task.observe(examples))
    task.save(folder)
    return task


def settings(task: Any) -> dict[str, Any]:
    """Return what a task does as it was told, beside what it learned of the data."""
    kept = ("score_threshold", "max_detections", "objective", "latent_size", "prefix", "max_target_length")
    kept += ("softmax", "negatives", "seed", "max_length")
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


@pytest.mark.parametrize(("options", "given", "same_time", "items"), [
    ({"same_time": "keep"}, {}, "keep", ["a", "b", "c"]),
    ({"same_time": "keep"}, {"same_time": "shuffle"}, "shuffle", ["a", "b", "c"]),
    ({"rating_column": "stars", "min_rating": 4}, {}, "shuffle", ["b", "c"]),
    ({"rating_column": "stars", "min_rating": 4}, {"rating_column": "stars", "min_rating": 0}, "shuffle", list("abc")),
])  # fmt: skip
@pytest.mark.parametrize("phase", ["finetune", "evaluate", "predict"])
def test_histories_are_those_that_the_model_has_learned_from(
    phase: str,
    options: dict[str, Any],
    given: dict[str, Any],
    same_time: str,
    items: list[str],
    tmp_path: Path,
) -> None:
    trained_with("recommendation", tmp_path, USERS, options)
    made = spec_options("recommendation", phase, given)
    reader, child = get("recommendation")(made), get("recommendation")(made)
    reader.follow(tmp_path)
    assert child.inherit(tmp_path)
    for task in (reader, child):
        assert task.instance(USERS[0])["history"] == items
        assert task.same_time == same_time  # type: ignore[attr-defined]
    (tmp_path / "again").mkdir()
    child.save(tmp_path / "again")
    again = get("recommendation").load(tmp_path / "again", made)
    assert again.instance(USERS[0])["history"] == items


@pytest.mark.parametrize(("given", "said"), [
    ({"ignore": ["age"]}, "task.ignore names 'age', which the model it starts from reads"),
    ({"categorical": ["age"]}, "task.categorical names 'age', which the model it starts from reads as a number"),
    ({"numeric": ["zip"]}, "task.numeric names 'zip', which the model it starts from reads as a category"),
    ({"categorical": ["id"]}, "task.categorical names 'id', which the model it starts from does not read"),
    ({"max_categories": 2}, "task.max_categories is 2, and the model it starts from tells 3 of a column apart"),
    ({"target_column": "age"}, "task.target_column is 'age', which the model it starts from reads"),
    ({"ignore": ["id"], "categorical": ["zip"], "numeric": ["age"]}, None),
])  # fmt: skip
def test_columns_that_a_table_model_reads_otherwise_are_refused(
    given: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    trained_with("tabular", tmp_path, TABLE, {"categorical": ["zip"]})
    child = get("tabular")(spec_options("tabular", "finetune", given))
    if said is None:
        assert child.inherit(tmp_path)
    else:
        with pytest.raises(TaskError, match=said):
            child.inherit(tmp_path)


def test_columns_of_a_policy_in_another_order_are_refused(tmp_path: Path) -> None:
    learned = {"observation_columns": ["x", "y"], "action_columns": ["steer", "brake"]}
    trained_with("policy", tmp_path, STEPS, learned)
    for option, columns in learned.items():
        other = {**learned, option: columns[::-1]}
        with pytest.raises(TaskError, match=f"task.{option} is .*each column has a scale of its own there"):
            get("policy")(spec_options("policy", "finetune", other)).inherit(tmp_path)
    assert get("policy")(spec_options("policy", "finetune", learned)).inherit(tmp_path)


@pytest.mark.parametrize("name", ["causal-lm", "seq2seq", "text-classification"])
@pytest.mark.parametrize("option", [{"vocab_size": 999}, {"sample_mb": 7}, {"sample_seed": 1}])
def test_how_a_tokenizer_is_trained_is_not_said_where_the_models_is_kept(name: str, option: dict[str, int]) -> None:
    kind = get(name)
    given = kind.Options.model_validate({"tokenizer": option})
    kind.check_options(given, None)
    with pytest.raises(TaskError, match=rf"tokenizer\.{next(iter(option))} has no effect: the tokenizer of 'parent'"):
        kind.check_options(given, "parent")
    kind.check_options(kind.Options.model_validate({}), "parent")
