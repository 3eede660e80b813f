"""A text classifier on the real stack: pretrain → finetune → evaluate → quantize → register → HTTP."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.connect import Connection, connection
from jobs import submit
from serve import endpoints
from serve.spec import ServeSpec
from tracking import manifest

BERT = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TASK = {"name": "text-classification", "text_column": "review", "label_column": "mood", "max_length": 12}
WORDS = {"praise": ["fine", "great", "lovely"], "blame": ["dull", "poor", "awful"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 reviews as a table without a header; one word in each tells its mood."""
    draw = random.Random(0)
    lines = []
    for number in range(200):
        mood = ["praise", "blame"][number % 2]
        around = [draw.choice(["the", "film", "is", "a", "story", "and"]) for _ in range(5)]
        around.insert(draw.randrange(6), draw.choice(WORDS[mood]))
        lines.append(f"{' '.join(around)}\t{mood}\n")
    path = tmp_path_factory.mktemp("reviews") / "reviews.tsv"
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def run(cluster: Connection, data: Path) -> Callable[..., dict[str, Any]]:
    """Run a job and return its result."""

    def run(name: str, phase: str, model: dict[str, Any], **sections: Any) -> dict[str, Any]:
        section = {"train": str(data), "columns": ["review", "mood"], "eval_fraction": 0.2}
        spec = {"name": name, "phase": phase, "task": TASK, "model": model, "data": section, **sections}
        path = data.parent / f"{name}.yaml"
        path.write_text(yaml.safe_dump(spec))
        outcome = submit.follow(submit.submit(path, []), lambda line, meaning: None)
        assert outcome.status == "SUCCEEDED", "\n".join(outcome.log)
        return outcome.result

    return run


def training(**changes: Any) -> dict[str, Any]:
    settings = {"steps": 60, "global_batch_size": 16, "learning_rate": 3e-3, "precision": "fp32", **changes}
    return {"training": {**settings, "deepspeed": {"zero_stage": 0}}}


def test_a_text_classifier_goes_from_a_table_to_an_answer(run: Callable[..., dict[str, Any]], data: Path) -> None:
    task = {**TASK, "tokenizer": {"train": "word"}}
    model = {"architecture": "bert", "config": BERT}
    first = run("reviews", "pretrain", model, **{**training(), "task": task}, register={"model": "reviews"})
    assert first["evaluation"]["accuracy"] > 0.9
    assert set(first["evaluation"]) == {"loss", "accuracy", "macro_f1", "calibration_error"}
    assert _artifacts(first["run_id"]) >= {"confusion.png"}

    tuned = run("reviews-tuned", "finetune", {"from": first["model"]}, **training(steps=5, learning_rate=1e-4))
    assert tuned["evaluations"]["first"]["loss"] == pytest.approx(first["evaluation"]["loss"], rel=1e-4)

    measured = run(
        "reviews-measured",
        "evaluate",
        {"from": tuned["directory"]},
        resources={"workers": 2},
        evaluate={"precision": "fp32"},
    )
    assert measured["evaluation"] == pytest.approx(tuned["evaluation"], rel=1e-4)
    assert _artifacts(measured["run_id"]) >= {"confusion.png"}

    small = run(
        "reviews-int8", "quantize", {"from": tuned["directory"]}, register={"model": "reviews", "alias": "int8"}
    )
    assert manifest.read(Path(small["directory"])).quantization["method"] == "int8-weight-only"
    assert small["evaluation"]["accuracy"] == pytest.approx(tuned["evaluation"]["accuracy"], abs=0.05)

    answers = _served("models:/reviews@int8", ["a great story", "the film is awful"])
    assert answers["label"] == ["praise", "blame"]
    assert all(score > 0.5 for score in answers["score"])


def _artifacts(run_id: str) -> set[str]:
    from mlflow.tracking import MlflowClient

    return {file.path for file in MlflowClient(connection().tracking_uri).list_artifacts(run_id)}


def _served(model: str, texts: list[str]) -> dict[str, list[Any]]:
    """Serve a model, ask it through the Open Inference Protocol, take it down; return its outputs by name."""
    spec = {"models": {"reviews": {"model": model, "resources": {"cpus_per_replica": 0.5}}}, "start_timeout_s": 120}
    outcome = endpoints.up(ServeSpec.model_validate(spec), print)
    try:
        body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}]}
        reply = httpx.post(f"{outcome['endpoint']}/v2/models/reviews/infer", content=json.dumps(body), timeout=60)
        assert reply.status_code == 200, reply.text
        return {part["name"]: part["data"] for part in reply.json()["outputs"]}
    finally:
        endpoints.down(print)
