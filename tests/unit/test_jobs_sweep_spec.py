"""A sweep's spec: what a field may be, which values are drawn, and what is refused, with its place in the file."""

from __future__ import annotations

import hashlib
import json
import textwrap
from typing import Any

import pytest
from pydantic import ValidationError

from cluster import specfile
from cluster.errors import UserError
from jobs.spec import JobSpec
from jobs.spec_sweep import FieldSpec, SweepSpec, baseline, of_trial, phase_of
from jobs.tasks.options import decisive

SWEEP = """\
name: tries
phase: sweep
task: {name: image-classification, image_size: 8}
model: {architecture: cnn, config: {width: 16}}
data: {train: sklearn-digits, eval_fraction: 0.2}
training: {steps: 20, eval_every: 5}
sweep:
  trials: 4
  metric: accuracy
  fields:
"""


def load(fields: str, *overrides: str) -> JobSpec:
    return specfile.loads(SWEEP + textwrap.indent(fields, "    "), JobSpec, overrides)


def refusal(fields: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(fields, *overrides)
    return str(caught.value)


def test_a_range_is_drawn_evenly_or_evenly_in_its_logarithm() -> None:
    assert [FieldSpec(min=1.0, max=3.0).at(share) for share in (0, 0.25, 0.5)] == [1.0, 1.5, 2.0]
    assert [FieldSpec(min=1e-4, max=1e-2, log=True).at(share) for share in (0, 0.5)] == [1e-4, 1e-3]


def test_steps_and_whole_numbers_reach_both_ends_and_nothing_between() -> None:
    steps = FieldSpec(min=0.0, max=0.3, step=0.1)
    assert [steps.nth(index) for index in range(steps.size or 0)] == [0.0, 0.1, 0.2, 0.3]
    assert steps.at(0.999) == 0.3
    whole = FieldSpec(min=2, max=64, whole=True, log=True)
    drawn = {whole.at(index / 1000) for index in range(1000)}
    assert min(drawn) == 2
    assert max(drawn) == 64
    assert all(type(value) is int for value in drawn)
    assert {FieldSpec(min=1, max=3, whole=True).at(index / 9) for index in range(9)} == {1, 2, 3}
    assert FieldSpec(min=1, max=2, whole=False).at(0.5) == 1.5


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ({"min": 2.0, "max": 1.0}, "the range is empty"),
        ({"min": 1.0}, "give `min` and `max`, or `choices`"),
        ({"min": 0.0, "max": 1.0, "log": True}, "needs a `min` above 0"),
        ({"min": 1.0, "max": 2.0, "step": 3.0}, "wider than the range"),
        ({"min": 1.0, "max": 9.0, "step": 1.0, "log": True}, "either `log: true` or a `step`"),
        ({"min": 1, "max": 4}, "say `whole: true`"),
        ({"min": 0.5, "max": 4, "whole": True}, "needs whole numbers"),
        ({"min": 1, "max": 4, "whole": True, "step": 0.5}, "needs a whole number as `step`"),
        ({"choices": []}, "at least 1 item"),
        ({"choices": [1, 2, 1]}, "1 is there twice"),
        ({"choices": [1], "min": 0.5}, "not both"),
    ],
)
def test_a_field_without_values_is_refused(field: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        FieldSpec.model_validate(field)


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        ({"fields": {"a": {"choices": [1, 2]}}}, "search: random needs `trials`"),
        ({"fields": {"a": {"min": 0.1, "max": 1.0}}, "search": "grid"}, "grid needs a `step`"),
        ({"fields": {"a": {"choices": [1, 2]}}, "search": "grid", "trials": 3}, "the grid has 2 points"),
        ({"fields": {"a": {"choices": [1, 2]}}, "trials": 3}, "there are 2 combinations, fewer than 3 trials"),
        ({"fields": {}, "trials": 3}, "at least 1 item"),
        ({"fields": {"a": {"choices": [1, 2]}}, "trials": 2, "scheduler": {"name": "none", "grace": 2}}, "leave grace"),
    ],
)
def test_a_number_of_trials_that_cannot_be_made_is_refused(sweep: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        SweepSpec.model_validate(sweep)


def test_a_grid_has_as_many_trials_as_points() -> None:
    fields = {"a": {"choices": [1, 2]}, "b": {"min": 1, "max": 3, "whole": True}}
    assert SweepSpec.model_validate({"fields": fields, "search": "grid"}).count == 6


def test_a_sweep_is_checked_like_its_trials() -> None:
    spec = load("training.learning_rate: {min: 1e-4, max: 1e-2, log: true}\nmodel.config.width: {choices: [16, 32]}\n")
    assert spec.sweep is not None
    assert spec.sweep.scheduler.name == "asha"
    assert JobSpec.model_validate(spec.resolved()) == spec
    trial = JobSpec.model_validate(
        of_trial(spec.resolved(), {"training.learning_rate": 3e-3, "model.config.width": 32, "task.image_size": 16})
    )
    assert (trial.phase, trial.sweep, trial.register_) == ("pretrain", None, None)
    assert trial.training is not None
    assert trial.training.learning_rate == 3e-3
    assert trial.model.config == {"width": 32}
    assert trial.task.options["image_size"] == 16
    assert spec.model.config == {"width": 16}


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("training.learning_rat: {min: 1e-4, max: 1e-2}", "spec:11: `sweep.fields.training.learning_rat`: there is no"),
        ("training.learning_rat: {min: 1e-4, max: 1e-2}", "did you mean 'training.learning_rate'?"),
        ("task.image_sise: {choices: [8, 16]}", "did you mean 'task.image_size'?"),
        ("optimiser: {choices: [adam, sgd]}", "there is no field 'optimiser'"),
        ("training.weight_decay: {min: -0.5, max: 0.5}", "weight_decay.min`: -0.5 cannot be its value"),
        ("training.schedule: {choices: [cosine, cosin]}", "schedule.choices.1`: 'cosin' cannot be its value"),
        ("training.warmup_steps: {min: 1.0, max: 4.0}", "2.11 cannot be its value: Input should be a valid integer"),
        ("training.warmup_steps: {choices: [5, 30]}", "choices.1`: 30 cannot be its value"),
        ("training.learning_rate: {min: 1e-2, max: 1e-4}", "the range is empty"),
        ("resources.workers: {choices: [1, 2]}", "decides nothing about the result"),
        ("model.export: {choices: [/a, /b]}", "trials export nothing to a store"),
        ("data.start_early: {choices: [true, false]}", "trials begin when their data is encoded"),
        ("training.micro_batch_size: {choices: [1, 2]}", "decides nothing about the result"),
        ("data.split_seed: {choices: [1, 2]}", "decides which rows are held out"),
        ("data.max_examples: {choices: [100, 200]}", "give the held-out rows a source of their own"),
        ("model.from: {choices: [a, b]}", "make a sweep for each"),
        ("task: {choices: [causal-lm, seq2seq]}", "make a sweep for each"),
    ],
)
def test_a_field_that_cannot_be_swept_is_refused_with_its_place(field: str, told: str) -> None:
    assert told in refusal(f"{field}\n", "sweep.trials=2")


RATE = "training.learning_rate: {min: 1e-4, max: 1e-2}\n"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sweep.metric=acuracy", "the task has no metric 'acuracy'; it has accuracy, loss"),
        ("training.eval_every=null", "asha compares trials at their evaluations: give `training.eval_every`"),
        ("data.eval_fraction=0", "nothing is held out to compare trials by"),
        ("sweep=null", "phase sweep needs a `sweep` section"),
        ("phase=pretrain", "phase pretrain takes nothing from `sweep`: leave it out"),
        ("sweep.phase=finetune", "phase finetune needs `model.from`"),
        ("training=null", "phase pretrain needs a `training` section"),
        ("sweep.scheduler=hyperband", "Input should be 'asha' or 'none'"),
    ],
)
def test_a_sweep_that_cannot_be_made_is_refused(override: str, told: str) -> None:
    assert told in refusal(RATE, override)


@pytest.mark.parametrize(
    ("field", "value", "is_one"),
    [
        ({"choices": [[1, 2], None]}, [1, 2], True),
        ({"choices": [16, 32]}, 24, False),
        ({"min": 1e-4, "max": 1e-2, "log": True}, 2e-3, True),
        ({"min": 1e-4, "max": 1e-2, "log": True}, 2e-2, False),
        ({"min": 0.0, "max": 0.3, "step": 0.1}, 0.3, True),
        ({"min": 0.0, "max": 0.3, "step": 0.1}, 0.25, False),
        ({"min": 1, "max": 9, "whole": True}, 4, True),
        ({"min": 1, "max": 9, "whole": True}, 4.5, False),
        ({"min": 0, "max": 9, "whole": True}, True, False),
        ({"min": 0.0, "max": 9.0}, None, False),
    ],
)
def test_which_values_are_a_field_s(field: dict[str, Any], value: Any, is_one: bool) -> None:
    assert FieldSpec.model_validate(field).has(value) is is_one


def test_the_baseline_must_be_among_what_the_sweep_may_try() -> None:
    spec = load(RATE, "sweep.baseline=true", "sweep.scheduler=asha")
    assert spec.sweep is not None
    assert baseline(spec.resolved(), spec.sweep.fields) == {"training.learning_rate": 3e-4}
    told = "--set sweep.baseline: `sweep.baseline`: the spec has model.config.width: 16, which is none of the values"
    assert told in refusal("model.config.width: {choices: [8, 32, 64, 128]}\n", "sweep.baseline=true")
    fields = {"a": {"choices": [1, 2]}}
    with pytest.raises(ValidationError, match="leave `baseline` out"):
        SweepSpec.model_validate({"fields": fields, "search": "grid", "baseline": True})


def test_without_a_scheduler_no_evaluation_on_the_way_is_needed() -> None:
    spec = load(RATE, "training.eval_every=null", "sweep.scheduler=none")
    assert spec.sweep is not None
    assert spec.sweep.scheduler.name == "none"


def test_what_a_trial_is_follows_from_where_the_model_comes_from() -> None:
    assert phase_of({"phase": "sweep", "model": {"from": "models:/a/1"}}) == "finetune"
    assert phase_of({"phase": "sweep", "model": {"architecture": "cnn"}}) == "pretrain"
    assert phase_of({"phase": "sweep", "model": {"from": "models:/a/1"}, "sweep": {"phase": "pretrain"}}) == "pretrain"
    assert phase_of({"phase": "evaluate"}) == "evaluate"


def test_how_many_at_once_and_how_long_make_no_other_sweep() -> None:
    spec = load(RATE)
    assert spec.digest() == load(RATE, "sweep.parallel=3", "sweep.time_budget_s=60").digest()
    assert spec.digest() != load(RATE, "sweep.seed=1").digest()


def test_the_digest_of_other_jobs_is_what_it_was_before_there_were_sweeps() -> None:
    spec = load(RATE, "phase=pretrain", "sweep=null")
    whole = spec.resolved()
    for key in ("resources", "storage", "register", "max_failures", "failures", "checkpoint", "sweep"):
        del whole[key]
    for key in ("deepspeed", "micro_batch_size", "gradient_checkpointing", "compile", "optimizer", "parallel"):
        del whole["training"][key]
    whole["task"] = decisive(whole["task"])
    del whole["predict"], whole["data"]["predict"], whole["model"]["export"]
    for key in ("duplicates", "mixture", "start_early"):
        del whole["data"][key]
    assert spec.digest() == hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
