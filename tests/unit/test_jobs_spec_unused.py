"""What a spec says to no effect is told, or refused; how many workers measure."""

import pytest

from cluster import specfile
from cluster.errors import UserError
from jobs import spec_unused
from jobs.driver import shares
from jobs.spec import JobSpec

BASE = "{name: x, phase: pretrain, model: {architecture: llama}, data: {train: a.txt}, training: {steps: 5}}"
MEASURING = "{name: x, phase: evaluate, model: {from: /m}, data: {eval: b}}"
PREFERRING = (
    "{name: x, phase: finetune, task: {name: causal-lm, objective: dpo}, data: {train: a.jsonl}, training: {steps: 5}, "
    "model: {from: /m, lora: {merge: false, base: nf4}}}"
)


def load(*overrides: str, text: str = BASE) -> JobSpec:
    return specfile.loads(text, JobSpec, overrides)


def test_what_every_phase_reads_is_let_through_and_what_has_no_effect_is_said():
    read = ["checkpoint={resume: never, keep: 2}", "failures={hang_after_s: 9}"]  # 2 is the default
    assert spec_unused.unused(load(*read, text=MEASURING)) == []
    elastic = "resources.workers={min: 1, max: 4, resize_every_s: 5}"
    (said,) = spec_unused.unused(load(elastic, text=MEASURING))
    assert "resize_every_s has no effect: phase evaluate decides once" in said
    (said,) = spec_unused.unused(load("phase=quantize", "resources.workers=4", text=MEASURING))
    assert said.startswith("resources.workers has no effect but that the job asks for room")
    assert spec_unused.unused(load("resources.workers={min: 1, max: 4, resize_every_s: 5}")) == []


def test_offload_to_the_memory_that_it_comes_from_is_said_and_not_refused():
    (said,) = spec_unused.unused(load("training.deepspeed={zero_stage: 2, offload: cpu}"))
    assert "offload: cpu saves no memory without GPUs" in said
    on_gpus = ["training.deepspeed={zero_stage: 2, offload: cpu}", "resources.gpus_per_worker=1"]
    assert spec_unused.unused(load(*on_gpus)) == []
    files = "training.deepspeed={zero_stage: 3, offload: cpu, offload_parameters: nvme, nvme_path: /d}"
    assert spec_unused.unused(load(files)) == []


def test_a_base_of_few_bits_is_not_compared_with_the_whole_one():
    for place in ("task.objective=ipo", "task.objective=dpo"):
        with pytest.raises(UserError, match=r"`model.lora.base`: is not offered with objective [di]po: .*leave it out"):
            load(place, text=PREFERRING)
    with pytest.raises(UserError, match=r"`model.lora.base`: is not offered with objective dpo"):
        load(text=PREFERRING.replace(", objective: dpo}, data: {", "}, data: {objective: dpo, "))
    assert load("task.objective=likelihood", text=PREFERRING)
    assert load("model.lora.base=whole", text=PREFERRING)


def test_as_many_workers_measure_as_there_was_room_for():
    wanted = load("resources.workers={min: 2, max: 4}", text=MEASURING).resources
    assert [shares.workers(wanted, placed) for placed in ({}, {"a": 1, "b": 2}, {"a": 9})] == [2, 3, 4]
    assert shares.workers(load("resources.workers=3", text=MEASURING).resources, {}) == 3
