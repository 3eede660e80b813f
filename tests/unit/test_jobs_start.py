"""A model that cannot be built or run is the spec's fault: a sentence, and no second try."""

import numpy as np
import pytest
import torch

from cluster.errors import UserError
from jobs.spec import JobSpec
from jobs.spec_sections import LoraSpec
from jobs.tasks import get
from jobs.worker import recomputing, start, zero
from jobs.worker.lora import add_lora

CLASSIFIER = {"name": "text-classification", "tokenizer": {"train": "word"}}
ROWS = [{"text": f"a film that is {word}", "label": word} for word in ("good", "bad")]


def spec(task: dict, architecture: str, config: dict, **training) -> JobSpec:
    model = {"architecture": architecture, "config": config}
    values = {"name": "x", "phase": "pretrain", "task": task, "model": model, "data": {"train": "x"}}
    return JobSpec.model_validate({**values, "training": {"steps": 1, **training}})


@pytest.fixture
def classifier():
    task = get("text-classification")({"tokenizer": {"train": "word"}})
    task.fit(task.observe(ROWS * 4))
    return task


@pytest.fixture
def lm():
    task = get("causal-lm")({"sequence_length": 32, "tokenizer": {"train": "bpe", "vocab_size": 300}})
    task.fit(task.observe([{"text": "the quick brown fox " * 30}]))
    return task


@pytest.mark.parametrize("config", [{"dropout": 2.0}, {"buckets": -1}, {"hidden_size": -4}])
def test_a_config_that_no_model_can_have_is_named(classifier, config):
    with pytest.raises(UserError, match=rf"model: ngram with model.config .*{next(iter(config))}.* cannot be built"):
        start.begin(spec(CLASSIFIER, "ngram", config), classifier, None)


class Drawn(torch.nn.Module):
    """Draws its weight where nobody sees it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(50, 20))
        self.weight.detach().numpy()[:] = np.random.normal(size=(50, 20))


class Odd(get("text-classification")):
    """Has one in its model."""

    def build(self, architecture, config):
        model = super().build(architecture, config)
        model.drawn = Drawn()
        return model


def test_a_module_that_is_built_alone_is_said_where_ranks_have_parts_and_the_rest_begins_as_without_it(classifier):
    task, wanted = Odd({"tokenizer": {"train": "word"}}), spec(CLASSIFIER, "ngram", {"hidden_size": 16})
    task.fit(task.observe(ROWS * 4))
    begun = start.begin(wanted, task, None, in_parts=True)
    assert [said for said in begun.said if said not in task.said] == [
        "every worker builds 1 module of class Drawn whole, one at a time, and keeps its part: drawn has 4.0 kB. It "
        "cannot be recorded: ValueError: assignment destination is read-only"
    ]
    assert start.begin(wanted, task, None).said == [*task.said]
    parts = {name: torch.empty(parameter.numel()) for name, parameter in begun.model.named_parameters()}
    for name, part in parts.items():
        half = len(part) // 2
        begun.fill(name, half, part[half:]), begun.fill(name, 0, part[:half])
    begun.close()
    assert begun.fill is None, "else what it was made of stays in memory"
    whole = dict(start.begin_whole(wanted, task, None).model.named_parameters())
    plain = dict(start.begin_whole(wanted, classifier, None).model.named_parameters())
    assert whole.keys() - plain.keys() == {"drawn.weight"}
    assert all(torch.equal(part, whole[name].flatten()) for name, part in parts.items())
    assert all(torch.equal(parameter, whole[name]) for name, parameter in plain.items())
    assert abs(float(whole["drawn.weight"].detach().std()) - 1) < 0.2


@pytest.mark.parametrize("config", [{"hidden_size": 0}, {"hidden_act": "foo"}, {"num_key_value_heads": 7}])
def test_so_is_one_that_shows_when_it_is_first_run(lm, config):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    wanted = spec({"name": "causal-lm"}, "llama", small | config)

    def begin():
        begun = start.begin(wanted, lm, None)
        begun.materialise()
        start.look(wanted, lm, begun.model, {"input_ids"})

    with pytest.raises(UserError, match=r"model: llama with model\.config"):
        begin()


def test_too_little_memory_is_no_fault_of_the_spec():
    assert not start.is_the_specs(MemoryError())
    assert not start.is_the_specs(torch.OutOfMemoryError("CUDA out of memory"))
    assert not start.is_the_specs(OSError(28, "no space left"))
    assert start.is_the_specs(ValueError("dropout probability has to be between 0 and 1"))


def test_layers_that_cannot_be_computed_again_are_refused(classifier, lm):
    with pytest.raises(UserError, match=r"training\.gradient_checkpointing: Ngram"):
        recomputing.check(classifier.build("ngram", {}))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    recomputing.check(lm.build("llama", small))
    recomputing.check(add_lora(lm.build("llama", small), LoraSpec()))


def test_a_deepspeed_file_that_is_not_there_is_refused_before_anything_starts(tmp_path):
    wrong = spec(CLASSIFIER, "ngram", {}, deepspeed="nope.json")
    with pytest.raises(UserError, match=r"training.deepspeed: cannot read .*nope.json"):
        zero.read_named(wrong.training, tmp_path)
