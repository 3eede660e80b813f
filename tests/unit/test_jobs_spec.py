"""JobSpec: every example loads, and what contradicts itself is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml

import jobs
from cluster import specfile
from cluster.errors import UserError
from jobs import parents
from jobs.spec import JobSpec
from jobs.tasks import TASKS
from jobs.worker.schedules import learning_rate

EXAMPLES = sorted((Path(jobs.__file__).parent / "specs").glob("*.yaml"))
BASE = "{name: x, phase: pretrain, model: {architecture: llama}, data: {train: a.txt}, training: {steps: 5}}"


def load(*overrides: str, text: str = BASE) -> JobSpec:
    return specfile.loads(text, JobSpec, overrides)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_loads_and_names_a_task_of_ours(path):
    assert specfile.load(path, JobSpec).task.name in TASKS


def test_there_is_an_example_of_every_phase_and_task():
    specs = [specfile.load(path, JobSpec) for path in EXAMPLES]
    assert {spec.phase for spec in specs} == set(get_args(JobSpec.model_fields["phase"].annotation))
    assert {spec.task.name for spec in specs} == set(TASKS)


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
        (["training.deepspeed.zero_stage=4"], "Input should be 0, 1, 2, 3 or 'auto'"),
        (["resources.workers=0"], "greater than 0"),
        (["resources.workers={min: 3, max: 2}"], "min 3 is above max 2"),
        (["failures.loss_spike=0.5"], "greater than 1"),
        (["training.decay_steps=2"], "decay_steps is for schedule warmup-stable-decay"),
        (["training.schedule=warmup-stable-decay", "training.decay_steps=9"], "are more than 5 steps"),
        (["training.schedule=constant", "training.min_learning_rate=1e-9"], "schedule constant stays at"),
        (["register={model: m, alias: latest}"], "alias 'latest' reads like a version"),
        (["phase=evaluate", "model={from: x, lora: {}}", "training=null"], "takes the model as it is"),
        (
            ["phase=evaluate", "model={from: x}", "training=null", "register={model: m}"],
            "phase evaluate makes no model",
        ),
    ],
)
def test_contradiction_is_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        load(*overrides)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_editor_with_the_schema_finds_nothing_wrong_with_an_example(path):
    values, _ = specfile.parse(path.read_text(), path.name)
    jsonschema.validate(values, JobSpec.model_json_schema())
    jsonschema.validate({**values, "task": "causal-lm"}, JobSpec.model_json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**values, "task": 3}, JobSpec.model_json_schema())


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


@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("task: causal-lm", ["task.sequence_length=64"]),
        ("task: causal-lm", ["data.sequence_length=64"]),
        ("data: {train: a, sequence_length: 64}", []),
        ("task: {name: causal-lm, sequence_length: 64}", []),
        ("task: {name: causal-lm, sequence_length: 32}", ["data.sequence_length=64"]),
        ("data: {train: a, sequence_length: 32}", ["task.sequence_length=64"]),
        ("task: {name: image-classification}", ["task={name: causal-lm, sequence_length: 64}"]),
        ("name: x", ["task.sequence_length=64"]),
    ],
)
def test_an_option_of_the_task_may_be_given_in_either_place(task, overrides):
    values = {**yaml.safe_load(BASE), **yaml.safe_load(task)}
    spec = load(*overrides, text=yaml.safe_dump(values))
    assert (spec.task.name, spec.task.options["sequence_length"]) == ("causal-lm", 64)
    assert "sequence_length" not in spec.resolved()["data"]
    assert spec.digest() == load("task.sequence_length=64", *(o for o in ["data.train=a"] if "data" in task)).digest()


def test_overrides_of_a_mapping_among_the_options_are_merged():
    text = BASE.replace("data: {", "data: {tokenizer: {train: bpe, vocab_size: 500}, ")
    assert load("task.tokenizer.vocab_size=300", text=text).task.options["tokenizer"]["train"] == "bpe"
    assert load("task.tokenizer.vocab_size=300", text=text).task.options["tokenizer"]["vocab_size"] == 300


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "task: {name: causal-lm, sequence_lenght: 3}",
            "spec:1: unknown key `sequence_lenght` in task; did you mean",
        ),
        ("task: {name: causal-lm, tokenizer: {vocab_siz: 3}}", "in task.tokenizer; did you mean `vocab_size`"),
        ("task: {name: causal-lm, sequence_length: 1}", "`task.sequence_length`: .* greater than or equal to 2"),
        ("task: causal-ml", "`task.name`: unknown task 'causal-ml'; did you mean 'causal-lm'"),
        ("data: {train: a, text_colum: b}", "spec:1: unknown key `text_colum` in data; did you mean `text_column`"),
        ("data: {train: a, evall: b}", "unknown key `evall` in data; did you mean `eval`"),
        ("data: {train: a, image_size: 8}", "unknown key `image_size` in data"),
        ("task: {name: causal-lm, tokenizer: {train: char, vocab_size: 99}}", "vocab_size has no effect on"),
        ("task: {name: causal-lm, tokenizer: {from: x, sample_mb: 9}}", "sample_mb has no effect on"),
        ("checkpoint: {metric: perplexty}", "no such metric .*did you mean `perplexity`"),
        ("checkpoint: {keep_best: 1}", "needs `training.eval_every`"),
        ("data: {train: a, max_bad_rows: 5}", "`data.max_bad_rows`: is for `data.bad_rows: skip`"),
        ("failures: {max_skipped: 5}", "`failures.max_skipped`: is for `failures.non_finite: skip`"),
        ("quantize: {precision: fp32}", "`quantize`: phase pretrain takes nothing from `quantize`: leave it out"),
    ],
)
def test_a_mistake_in_a_tasks_options_has_its_line_and_a_suggestion(line, said):
    base = {key: value for key, value in yaml.safe_load(BASE).items() if key != line.partition(":")[0]}
    with pytest.raises(UserError, match=said):
        load(text=line + "\n" + yaml.safe_dump(base))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("training: {steps: 5, precision: fp32}", r"takes nothing from `training`: .*`evaluate.precision`"),
        ("quantize: {precision: fp32}", "takes nothing from `quantize`"),
        ("data: {eval: b, max_examples: 3}", "`data.max_examples`: is for `data.train`, and there is none"),
        ("checkpoint: {every_steps: 3}", "`checkpoint.every_steps`: is for phases that train, and this is .*evaluate"),
        ("checkpoint: {directory: /x}", "`checkpoint.directory`: is for phases that train"),
        ("failures: {loss_spike: 3}", "`failures.loss_spike`: is for phases that train"),
        ("failures: {out_of_memory: stop}", "`failures.out_of_memory`: is for phases that train"),
    ],
)
def test_what_would_do_nothing_in_a_measurement_is_refused(line, said):
    base = {"name": "x", "phase": "evaluate", "model": {"from": "models:/x/1"}, "data": {"eval": "b"}}
    base.pop(line.partition(":")[0], None)
    with pytest.raises(UserError, match=said):
        load(text=line + "\n" + yaml.safe_dump(base))


def test_an_option_in_both_places_is_refused():
    text = yaml.safe_dump({**yaml.safe_load(BASE), "task": {"name": "causal-lm", "text_column": "a"}})
    with pytest.raises(UserError, match=r"`data.text_column`: is given as `task.text_column` too"):
        load(text=text.replace("train: a.txt", "train: a.txt\n  text_column: a"))


def test_all_mistakes_are_listed_at_once():
    text = BASE.replace("{steps: 5}", "{stps: 5, steps: 5}").replace("train: a.txt", "train: a, sequence_lenght: 3")
    with pytest.raises(UserError, match=r"(?s)`stps`.*`sequence_lenght`"):
        load(text=text)


def test_what_sections_lack_of_each_other_is_listed_beside_the_mistakes_within_them():
    text = (
        "name: x\nphase: finetune\nmodel:\n  architecture: llama\nresources:\n  wokers: 2\ncheckpoint:\n  keep: true\n"
    )
    with pytest.raises(UserError) as refused:
        load(text=text)
    said = str(refused.value).splitlines()
    assert len(said) == 5
    expected = (
        "needs a `training`",
        "needs `data.train`",
        "needs `model.from`",
        "spec:6: unknown key",
        "spec:8: `check",
    )
    for part in expected:
        assert any(part in line for line in said), part


@pytest.mark.parametrize("task", TASKS)
def test_looking_a_tasks_options_up_loads_neither_torch_nor_transformers(task):
    code = (
        "import sys; from jobs.spec import JobSpec\n"
        f"spec = JobSpec.model_validate({{'name': 'x', 'phase': 'evaluate', 'task': {task!r}, "
        "'data': {'eval': 'a'}, 'model': {'from': 'x'}})\n"
        "print(len(spec.task.options) > 0, *sorted({'torch', 'transformers', 'ray', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.steps=true", "takes a number, not true or false"),
        ("training.steps=1e13", "less than or equal to"),
        ("training.steps=1.5", "takes a whole number"),
        ("training.steps=abc", r"takes a whole number \(given: 'abc'\)"),
        ("training.learning_rate=.inf", "takes a finite number"),
        ("training.learning_rate=1e999", "takes a finite number"),
        ("training.learning_rate=.nan", "takes a finite number"),
        ("training.betas=[5, 0.9]", "`training.betas.0`: .*less than 1"),
        ("training.betas=[0.9, true]", "`training.betas`: takes a number, not true"),
        ("training.epsilon=1", "less than 1"),
        ("training.seed=99999999999999999999", "takes a smaller number"),
        ("training.deepspeed.zero_stage=true", "takes a number, not true or false"),
        ("training.deepspeed=3", "takes a mapping of keys to values or text"),
        ("training.gradient_checkpointing=3", "takes true or false"),
        ("resources.workers=1e9", "less than or equal to 100000"),
        ("resources.workers=abc", "takes a whole number or a mapping of keys to values"),
        ("resources.workers={min: 3}", "`resources.workers.max` is missing"),
        ("resources=null", "takes a mapping of keys to values .given: nothing; leave the key out"),
        ("task.sequence_length=1e9", "less than or equal to 4194304"),
        ("task.sequence_length=true", "takes a number, not true or false"),
        ("data.train=[]", "takes what is not empty"),
        ("data.train=' '", "takes text that is not empty"),
        ("data.eval=2020-01-01", "YAML reads this as a date"),
        ("name=!!binary aGk=", "YAML reads this as a bytes"),
        ("model.lora.target_modules=5", "takes 'all-linear' or a list"),
        ("model.lora.alpha=0", "greater than 0"),
        ("model.config={rope_theta: .inf}", "config.rope_theta is inf"),
        ("model.config={1: 2}", "key 1 in model.config is no text"),
        ('name="\\ud83d"', "half a character"),
        ("checkpoint.keep=" + "9" * 5000, "not valid YAML"),
    ],
)
def test_a_value_that_can_be_no_setting_is_refused_in_plain_words(override, said):
    with pytest.raises(UserError, match=said) as refused:
        load(override)
    assert not re.search(r"constrained|function-|Input should be a valid|WorkersSpec|Spec\b", str(refused.value))


@pytest.mark.parametrize(
    ("override", "value"),
    [("learning_rate='1e-4'", 1e-4), ("learning_rate=1e-4", 1e-4), ("steps=1e3", 1000), ("steps='7'", 7)],
)
def test_numbers_may_be_written_as_people_write_them(override, value):
    name = override.partition("=")[0]
    assert getattr(load(f"training.{override}").training, name) == value


def test_the_schedule_is_held_against_the_steps_that_epochs_come_to():
    training = load("training={epochs: 2, warmup_steps: 50}").training
    assert training.too_long_for(51) is None
    assert training.too_long_for(50) == "warmup_steps 50 leaves nothing of 50 steps"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.config={hiden_size: 8}"], "model.config: llama has no 'hiden_size'; did you mean 'hidden_size'"),
        (["model.architecture=lama"], "did you mean 'llama'"),
        (["task=text-classification", "model.architecture=ngram", "model.config={bukets: 8}"], "ngram has no 'bukets'"),
        (["task=text-classification", "model.architecture=bert", "model.config={hiden_size: 8}"], "bert has no"),
        (["task=image-classification", "model.architecture=cnn", "model.config={widht: 8}"], "cnn has no 'widht'"),
        (["task=image-classification", "model.architecture=cnnn"], "model.architecture 'cnnn'"),
    ],
)
def test_an_architectures_misspelt_entry_is_refused_before_anything_starts(overrides, said, tmp_path):
    with pytest.raises(UserError, match=said):
        parents.find(load(*overrides), tmp_path)
    assert parents.find(load("model.config={hidden_size: 64}"), tmp_path) is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["training={steps: 10, warmup_steps: 20, min_learning_rate: 1, decay_steps: 3}"],
            ["min_learning_rate 1 is above learning_rate 0.0003", "decay_steps is for schedule warmup-stable-decay",
             "warmup_steps 20 leaves nothing of 10 steps"],
        ),
        (["training={step: 10, learning_rat: 1}"], ["mean `steps`", "mean `learning_rate`", "give exactly one"]),
        (["training={steps: ten, min_learning_rate: 2}"], ["takes a whole number", "min_learning_rate 2 is above"]),
        (
            ["data.eval_fraction=0", "checkpoint.keep_best=1", "training.eval_every=5"],
            ["nothing is held out to be measured"],
        ),
        (["phase=evaluate", "model={from: x}", "data={train: a.txt, eval_fraction: 0}"], ["an `eval_fraction` above"]),
        (["phase=evaluate", "model={from: x}", "data={eval: a.txt, max_examples: 3}"], ["is for `data.train`, and"]),
        (
            ["data.columns=[a, b, a]", "task.text_column=''"],
            ["the column 'a' is there twice", "takes text that is not empty"],
        ),
    ],
)  # fmt: skip
def test_mistakes_that_sections_and_schedules_make_together_are_listed_at_once(overrides, said):
    with pytest.raises(UserError) as refused:
        load(*overrides)
    lines = str(refused.value).splitlines()
    assert all(any(each in line for line in lines) for each in said), lines
    assert len(lines) == len(set(lines)), "each is said once"


def test_all_misspelt_entries_of_a_config_are_listed_at_once(tmp_path):
    with pytest.raises(UserError, match=r"no 'hiden_size'; did you mean 'hidden_size'., and no 'num_layer'"):
        parents.find(load("model.config={hiden_size: 8, num_layer: 2}"), tmp_path)


@pytest.mark.parametrize(("steps", "decay"), [(1800, 600), (100, 33), (3, 1)])
def test_a_decay_may_be_a_share_of_the_steps(steps, decay):
    training = load(
        f"training={{steps: {steps}, schedule: warmup-stable-decay, decay_steps: 0.3334, learning_rate: 1}}"
    ).training
    rates = [learning_rate(training, step, steps) for step in range(steps)]
    assert rates.count(1) == steps - decay + 1, "the first step of the decay is still at the peak"
    assert training.too_long_for(steps) is None


def test_the_shipped_job_runs_at_any_length():
    path = next(path for path in EXAMPLES if path.name == "stdlib-lm.yaml")
    for steps in (30, 620, 1800):
        assert specfile.load(path, JobSpec, [f"training.steps={steps}"]).training.steps == steps
