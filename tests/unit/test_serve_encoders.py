"""Classifiers of texts that are encoders answer /v1/embeddings: the mean of the last hidden states, without padding."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from jobs import tasks
from serve.api import routes
from serve.api.gateway import Gateway
from serve.deploy import plan
from serve.engines import predictive
from serve.engines.replica import PredictiveReplica
from serve.engines.table import ReplicaSetup, TaskOptions
from serve.spec import ServeSpec
from serve.wire import Identity
from tests.support.predictive import gateway
from tracking.manifest import ModelManifest, write

TEXTS = ["a good film", "bad", "a film, a film, and a good one"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def exported(folder: Path, architecture: str, config: dict[str, Any]) -> Path:
    """Write an untrained classifier of texts, as a job leaves it."""
    task = tasks.get("text-classification")({"tokenizer": {"train": "word"}, "max_length": 16})
    examples = [{"text": text, "label": str(at)} for at, text in enumerate(TEXTS)] * 2
    task.fit(task.observe(examples))
    torch.manual_seed(0)
    task.build(architecture, config).save_pretrained(folder)  # type: ignore[operator]
    task.save(folder)
    write(folder, ModelManifest(name="opinions", task="text-classification", architecture=architecture))
    return folder


def loaded(folder: Path) -> PredictiveReplica:
    options = TaskOptions(max_wait_ms=5)
    return predictive.load(
        ReplicaSetup(folder, Identity("1", "run-1"), "text-classification", options, "fp32", None, 8, 1)
    )


def served(folder: Path, scenario: Any) -> None:
    """Run a scenario against a gateway over the model, with the card that the plan gives it."""

    async def inside() -> None:
        replica = loaded(folder)
        await replica.start()
        front: Gateway = gateway({"opinions": replica})[0]
        spec = ServeSpec.model_validate({"models": {"opinions": {"model": str(folder)}}})
        details = plan.resolve(spec)[0].details
        front.catalog = {"opinions": dataclasses.replace(front.catalog["opinions"], details=details)}
        transport = httpx.ASGITransport(routes.build(lambda: front), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            await scenario(client)
        await replica.stop()

    asyncio.run(inside())


def expected(folder: Path, text: str) -> np.ndarray:
    """Return the vector that plain transformers give for a text alone."""
    task = tasks.get("text-classification").load(folder)
    model: Any = task.load_model(folder)
    with torch.inference_mode():
        states = model.base_model(**task.tokenizer(text, return_tensors="pt", return_token_type_ids=False))[0][0]
    return (states.mean(0) / states.mean(0).norm()).numpy()


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("bert", SIZES),
        ("roberta", SIZES),
        ("distilbert", {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 2}),
        ("modernbert", SIZES),
    ],
)
def test_vectors_are_those_of_each_text_alone_beside_answers_of_the_same_batch(
    tmp_path: Path, architecture: str, config: dict[str, Any]
) -> None:
    folder = exported(tmp_path, architecture, config)

    async def scenario(client: httpx.AsyncClient) -> None:
        card = (await client.get("/v1/models/opinions")).json()
        assert card["embeddings"] == {"pooling": "mean", "normalized": True}
        infer = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [3], "data": TEXTS}]}
        alone = (await client.post("/v2/models/opinions/infer", json=infer)).json()
        answer, beside = await asyncio.gather(
            client.post("/v1/embeddings", json={"model": "opinions", "input": TEXTS}),
            client.post("/v2/models/opinions/infer", json=infer),
        )
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-tandem-run-id"] == "run-1"
        for part, text in zip(answer.json()["data"], TEXTS, strict=True):
            np.testing.assert_allclose(part["embedding"], expected(folder, text), atol=1e-5)
        for was, now in zip(alone["outputs"], beside.json()["outputs"], strict=True):
            if was["datatype"] == "FP32":
                np.testing.assert_allclose(was["data"], now["data"], atol=1e-5)
        ids = tasks.get("text-classification").load(folder).tokenizer(TEXTS[0])["input_ids"]
        tokens = (await client.post("/v1/embeddings", json={"model": "opinions", "input": ids})).json()
        np.testing.assert_allclose(tokens["data"][0]["embedding"], answer.json()["data"][0]["embedding"], atol=1e-5)
        assert tokens["usage"]["prompt_tokens"] == len(ids)

    served(folder, scenario)


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({"input": ["a", "film " * 40]}, "input[1]", "context is 16 tokens"),
        ({"input": [5000]}, "input", "outside the vocabulary"),
        ({"input": "a", "dimensions": 8}, "dimensions", "32 numbers"),
        ({"input": ""}, "input", "is empty"),
    ],
)
def test_what_cannot_be_embedded_is_refused(tmp_path: Path, given: dict[str, Any], param: str, said: str) -> None:
    folder = exported(tmp_path, "bert", SIZES)

    async def scenario(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/embeddings", json={"model": "opinions", **given})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param)
        assert said in error["message"]

    served(folder, scenario)


def test_a_classifier_without_states_of_tokens_makes_none(tmp_path: Path) -> None:
    folder = exported(tmp_path, "ngram", {"hidden_size": 8, "buckets": 16})

    async def scenario(client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/models/opinions")).json()["embeddings"] is None
        answer = await client.post("/v1/embeddings", json={"model": "opinions", "input": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_task")

    served(folder, scenario)
