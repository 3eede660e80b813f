"""A hub id as `model.from` or `task.tokenizer.from`: its own tokenizer, and refused before its weights are fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from jobs import parents
from jobs.data import prepare
from jobs.spec import JobSpec
from tests.support import hub, tiny_models

CODE = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no connection."""
    hub.use(tmp_path / "cache", monkeypatch)
    return tmp_path / "cache"


def spec(source: str | None = "org/tiny", **task: Any) -> JobSpec:
    values: dict[str, Any] = {"name": "x", "phase": "finetune", "model": {"from": source}}
    if source is None:
        values |= {"phase": "pretrain", "model": {"architecture": "llama"}}
    data = {"train": "x.txt", "eval_fraction": 0.2}
    task = {"name": "causal-lm", "sequence_length": 16, **task}
    return JobSpec.model_validate({**values, "task": task, "data": data, "training": {"steps": 1}})


def test_a_model_in_the_cache_keeps_its_own_tokenizer(cache: Path, tmp_path: Path) -> None:
    fast = tiny_models.tokenizer(300)
    fast.chat_template = "{{ messages[0].content }}"
    model = tiny_models.decoder("llama", vocab_size=len(fast), num_hidden_layers=1)
    hub.keep(cache, "org/tiny", tiny_models.export(tmp_path / "tiny", fast, model))
    (tmp_path / "x.txt").write_text("the quick brown fox\n" * 40)
    parent = parents.find(spec(), tmp_path)
    assert parent == "org/tiny"
    made = prepare.prepare(spec(), tmp_path, tmp_path / "s", parent=parent, on_progress=lambda *_: None)
    task = made.task(spec())
    assert task.tokenizer.get_vocab() == fast.get_vocab()
    assert task.tokenizer.chat_template == fast.chat_template
    assert not any("tokenizer trained" in note for note in made.notes)
    assert task.load_model(Path(parent)).config.vocab_size == 300

    fast.chat_template = "{{ messages }}"
    other = tiny_models.export(tmp_path / "other", fast, model)
    hub.keep(cache, "org/other", other)
    another = prepare.prepare(spec("org/other"), tmp_path, tmp_path / "s", parent="org/other", on_progress=print)
    assert another.digest != made.digest


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": {"model_type": "llama", **CODE}}, "has `auto_map`"),
        ({"config.json": {"model_type": "llama"}, "generation_config.json": CODE}, "generation_config.json has `auto"),
        ({"adapter_config.json": {"base_model_name_or_path": "org/base"}}, "holds an adapter for org/base"),
        ({"config.json": {"model_type": "llama"}, "pytorch_model.bin": {}}, "weights in a pickle"),
        ({"config.json": {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}}, r"\(gptq\)"),
        ({"config.json": {"model_type": "vit"}}, "is a vit, which is no causal architecture"),
    ],
)
def test_what_the_cache_tells_is_refused_at_validate(files: Any, said: str, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name, content in files.items():
        (tmp_path / "source" / name).write_text(json.dumps(content))
    hub.keep(cache, "org/tiny", tmp_path / "source")
    for look in (parents.preflight, parents.find):
        with pytest.raises(UserError, match=said):
            look(spec(), tmp_path)


def test_what_is_not_in_the_cache_is_said_at_validate(cache: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert parents.preflight(spec(), tmp_path, unchecked=said.append) is None
    assert said == ["model.from: org/tiny is not in this machine's cache of the hub, so its files were not looked at"]


@pytest.fixture
def served(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub with one model; the names of the files that are fetched from it."""
    files = {name: json.dumps(content).encode() for name, content in request.param.items()}
    with hub.served("org/tiny", files) as (address, fetched):
        hub.use(tmp_path / "cache", monkeypatch, address)
        yield fetched


@pytest.mark.parametrize(
    ("served", "said"),
    [
        ({"config.json": {"model_type": "llama", **CODE}, "model.safetensors": 1}, "config.json has `auto_map`"),
        ({"config.json": {"model_type": "llama"}, "pytorch_model.bin": 1}, "pytorch_model.bin: weights in a pickle"),
    ],
    indirect=["served"],
)
def test_what_only_the_hub_tells_is_refused_before_weights_are_fetched(
    served: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        parents.find(spec(), tmp_path)
    assert served == ["config.json"]


@pytest.mark.parametrize("served", [{"tokenizer_config.json": CODE, "pytorch_model.bin": 1}], indirect=True)
def test_a_tokenizer_of_the_hub_with_code_of_its_own_is_refused(served: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task.tokenizer.from: org/tiny: .*has `auto_map`"):
        parents.find(spec(None, tokenizer={"from": "org/tiny"}), tmp_path)
    assert served == ["tokenizer_config.json"]


def test_a_tokenizer_lies_beside_the_spec(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job runs in another folder than the spec's, where of a tokenizer there are the small files at most."""
    fast = tiny_models.tokenizer(300)
    (tmp_path / "spec").mkdir()
    (tmp_path / "job").mkdir()
    fast.save_pretrained(tmp_path / "spec" / "tok")
    tiny_models.tokenizer(310).save_pretrained(tmp_path / "job" / "tok")
    (tmp_path / "spec" / "x.txt").write_text("the quick brown fox\n" * 40)
    monkeypatch.chdir(tmp_path / "job")
    for named in ("tok", "./tok"):
        own = spec(None, tokenizer={"from": named})
        assert parents.find(own, tmp_path / "spec") is None
        made = prepare.prepare(own, tmp_path / "spec", tmp_path / "s", parent=None, on_progress=lambda *_: None)
        assert len(made.task(own).tokenizer) == 300
    with pytest.raises(UserError, match=r"task.tokenizer.from: no folder at .*spec/absent"):
        parents.preflight(spec(None, tokenizer={"from": "./absent"}), tmp_path / "spec")
    (tmp_path / "spec" / "tok" / "config.json").write_text(json.dumps(CODE))
    for look in (parents.preflight, parents.find):
        with pytest.raises(UserError, match=r"task.tokenizer.from: ./tok: .*has `auto_map`"):
            look(spec(None, tokenizer={"from": "./tok"}), tmp_path / "spec")
