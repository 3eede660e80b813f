"""JobSpec: every example loads, and what contradicts itself is refused."""

import json
from pathlib import Path

import pytest

import jobs
from cluster import specfile
from cluster.errors import UserError
from jobs.spec import JobSpec
from jobs.tasks import TASKS

EXAMPLES = sorted((Path(jobs.__file__).parent / "specs").glob("*.yaml"))
BASE = "{name: x, phase: pretrain, model: {architecture: llama}, data: {train: a.txt}, training: {steps: 5}}"


def load(*overrides: str, text: str = BASE) -> JobSpec:
    return specfile.loads(text, JobSpec, overrides)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_loads_and_names_a_task_of_ours(path):
    assert specfile.load(path, JobSpec).task in TASKS


def test_there_is_an_example_of_every_phase_and_task():
    specs = [specfile.load(path, JobSpec) for path in EXAMPLES]
    assert {spec.phase for spec in specs} == {"pretrain", "finetune", "evaluate", "quantize"}
    assert {spec.task for spec in specs} == set(TASKS)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["phase=finetune"], "needs `model.from`"),
        (["model.from=models:/a/1"], "not both"),
        (["training=null"], "needs a `training` section"),
        (["data.train=null"], "needs `data.train`"),
        (["training.epochs=2"], "exactly one of `steps` and `epochs`"),
        (["training.warmup_steps=5"], "leaves nothing of 5 steps"),
        (["training.min_learning_rate=1"], "above learning_rate"),
        (["data.tokenizer.train=bpe", "data.tokenizer.from=x"], "not both"),
        (["name=a/b"], "is not a valid name"),
        (["training.deepspeed.zero_stage=4"], "Input should be 0, 1, 2 or 3"),
        (["resources.workers=0"], "greater than 0"),
        (["resources.workers={min: 3, max: 2}"], "min 3 is above max 2"),
        (["failures.loss_spike=0.5"], "greater than 1"),
    ],
)
def test_contradiction_is_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        load(*overrides)


def test_schema_is_json_and_documents_the_keys():
    schema = JobSpec.model_json_schema()
    json.dumps(schema)
    assert "from" in schema["$defs"]["ModelSpec"]["properties"]
    assert (
        "at any number of workers" in schema["$defs"]["TrainingSpec"]["properties"]["global_batch_size"]["description"]
    )


def test_resolved_spec_loads_again_unchanged():
    spec = load()
    assert JobSpec.model_validate(spec.resolved()) == spec


def test_digest_is_that_of_the_result_not_of_the_workers():
    assert load().digest() == load("resources.workers=4", "storage=/tmp/x").digest()
    assert load().digest() == load("training.deepspeed.zero_stage=3", "training.micro_batch_size=1").digest()
    assert load().digest() == load("failures.non_finite=skip", "checkpoint.keep=9").digest()
    assert load().digest() != load("training.seed=1").digest()


def test_workers_are_a_number_or_a_range():
    fixed, elastic = load("resources.workers=4").resources, load("resources.workers={max: 8}").resources
    assert (fixed.fewest, fixed.most) == (4, 4)
    assert (elastic.fewest, elastic.most) == (1, 8)
