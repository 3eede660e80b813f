"""A spec file → a validated model, and what a mistake says."""

import pytest

from cluster import specfile
from cluster.errors import UserError
from jobs.spec import JobSpec
from serve.spec import ServeSpec

SPEC = """\
name: x
phase: pretrain
model: {architecture: llama, config: {hidden_size: 32}}
data: {train: python-stdlib}
training:
  steps: 10
  learning_rate: 1e-4
"""


def load(text: str, *overrides: str) -> JobSpec:
    return specfile.loads(text, JobSpec, overrides, name="x.yaml")


def complaint(text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_numbers_in_scientific_notation_are_numbers():
    assert load(SPEC).training.learning_rate == 1e-4


def test_override_wins_over_the_file_and_reaches_deep():
    spec = load(SPEC, "training.steps=7", "model.config.hidden_size=64", "training.deepspeed.zero_stage=3")
    assert (spec.training.steps, spec.model.config["hidden_size"], spec.training.deepspeed.zero_stage) == (7, 64, 3)


def test_later_override_wins():
    assert load(SPEC, "training.steps=7", "training.steps=8").training.steps == 8


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("lerning_rate", "x.yaml:7: unknown key `lerning_rate` in training; did you mean `learning_rate`?"),
        ("qqq", "x.yaml:7: unknown key `qqq` in training; known keys: betas,"),
    ],
)
def test_unknown_key_names_line_and_suggestion(wrong, said):
    assert said in complaint(SPEC.replace("learning_rate", wrong))


def test_unknown_key_inside_a_choice_of_kinds_is_reported_once():
    message = complaint(SPEC + "  deepspeed: {zero_stag: 2}\n")
    assert message == "x.yaml:8: unknown key `zero_stag` in training.deepspeed; did you mean `zero_stage`?"


def test_every_mistake_is_listed():
    message = complaint(SPEC.replace("steps: 10", "steps: ten").replace("name: x", "nam: x"))
    assert "`name` is missing" in message
    assert "did you mean `name`" in message
    assert "x.yaml:6: `training.steps`" in message


def test_mistake_in_an_override_says_so():
    assert complaint(SPEC, "training.stepps=5").startswith("--set training.stepps: unknown key")
    assert "key.path=value" in complaint(SPEC, "training.steps")


def test_an_override_drops_nothing_unsaid():
    message = complaint(SPEC, "name.first=5")
    assert message == "--set 'name.first=5': `name` is 'x', which this would drop; set `name` whole"


def test_repeated_key_is_an_error():
    assert "given twice" in complaint(SPEC + "name: y\n")


def test_broken_yaml_names_the_line():
    assert complaint("name: x\nmodel: [").startswith("x.yaml:2: not valid YAML")


def test_what_a_spec_must_not_do_is_refused(tmp_path):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
    )
    marker = tmp_path / "marker"
    for text, said in [
        (bomb, "aliases"),
        ("a: &a [*a]\n", "aliases"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a:\n\tb: 1\n", "spec:2: not valid YAML"),
        (f"a: !!python/object/apply:os.mkdir ['{marker}']\n", "spec:1: not valid YAML"),
    ]:
        with pytest.raises(UserError, match=said):
            specfile.parse(text, "spec")
    assert not marker.exists()


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        specfile.load(tmp_path / "none.yaml", JobSpec)


def test_a_list_is_no_spec():
    assert "a spec is a mapping" in complaint("- 1\n- 2\n")


def test_a_section_in_short_form_takes_overrides_of_its_keys():
    job = "name: n\nphase: evaluate\nmodel: {from: a}\ndata: {eval: x}\n"
    for text, before in ((f"{job}task: text-classification\n", []), (job, ["task=text-classification"])):
        spec = specfile.loads(text, JobSpec, [*before, "task.label_column=mood"])
        assert (spec.task.name, spec.task.options["label_column"]) == ("text-classification", "mood")
    served = specfile.loads("models: {m: {model: d, engine: torch}}", ServeSpec, ["models.m.engine.cache_gib=2"])
    assert (served.models["m"].engine.name, served.models["m"].engine.options) == ("torch", {"cache_gib": 2})
    with pytest.raises(UserError, match="`training` is 3, which this would drop"):
        specfile.loads(f"{job}training: 3\n", JobSpec, ["training.steps=4"])
