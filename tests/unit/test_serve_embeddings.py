"""/v1/embeddings over a real engine: vectors are plain transformers' hidden states, pooled, at length 1."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from serve.deploy import plan
from serve.engines.protocol import EngineError, GenerationRequest, Pooling, RequestError, SamplingParams
from serve.engines.replica import GenerativeReplica
from serve.engines.torch.torch_engine import TorchEngine, TorchEngineOptions
from serve.spec import ServeSpec
from serve.wire import EmbedCall, Identity, Refused
from tests.support import tiny_models
from tests.support.in_process import InProcess, run

CONTEXT = 128


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.language_model(tmp_path_factory.mktemp("tiny"), context=CONTEXT)


def expected(model: Any, ids: tuple[int, ...], pooling: Pooling = "mean") -> np.ndarray:
    with torch.inference_mode():
        states = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    vector = states.mean(dim=0) if pooling == "mean" else states[-1]
    return (vector / vector.norm()).numpy()


def texts(*lengths: int) -> list[tuple[int, ...]]:
    return [tuple((7 * at + length) % 300 for at in range(length)) for length in lengths]


async def embedded(engine: TorchEngine, inputs: list[tuple[int, ...]]) -> list[np.ndarray]:
    return list(await asyncio.gather(*(engine.embed(str(at), ids) for at, ids in enumerate(inputs))))


def over(engine: TorchEngine, work: Any) -> Any:
    async def inside() -> Any:
        await engine.start()
        try:
            return await work(engine)
        finally:
            await engine.stop()

    return asyncio.run(inside())


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
def test_a_vector_is_the_pooled_states_of_plain_transformers(kind: str, pooling: Pooling) -> None:
    # texts of one token, of a block and one, of several steps, and of the whole context
    inputs = texts(1, 2, 33, 40, 100, CONTEXT)
    plain = tiny_models.decoder(kind, seed=1, spread=0.3)
    engine = TorchEngine(
        tiny_models.decoder(kind, seed=1, spread=0.3),
        tiny_models.tokenizer(),
        TorchEngineOptions(max_batch=4, prefill_tokens=16, threads=1, pooling=pooling),
        "fp32",
    )
    vectors = over(engine, lambda engine: embedded(engine, inputs))
    for ids, vector in zip(inputs, vectors, strict=True):
        assert vector.dtype == np.float32
        assert vector.shape == (engine.embedding_size,)
        np.testing.assert_allclose(vector, expected(plain, ids, pooling), atol=1e-4)


def test_streams_beside_embeddings_and_a_text_twice_in_the_cache_change_nothing(directory: Path) -> None:
    engine = TorchEngine.from_directory(directory, precision="fp32", max_batch=4, threads=1, prefill_tokens=16)
    plain = TorchEngine.from_directory(directory, precision="fp32")._model
    text = texts(96)[0]

    async def stream(engine: TorchEngine) -> tuple[int, ...]:
        params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
        request = GenerationRequest("stream", text[:40], params)
        return tuple([token async for delta in engine.generate(request) for token in delta.token_ids])

    async def work(engine: TorchEngine) -> Any:
        alone = await stream(engine)
        beside, vectors = await asyncio.gather(stream(engine), embedded(engine, [text] * 9))
        return alone, beside, vectors, engine.load()

    alone, beside, vectors, load = over(engine, work)
    assert beside == alone
    for vector in vectors:
        np.testing.assert_allclose(vector, expected(plain, text), atol=1e-4)
    assert (load.running, load.waiting, load.cache_tokens_used) == (0, 0, 0)


def test_texts_that_can_never_be_embedded_and_an_engine_that_has_stopped(directory: Path) -> None:
    engine = TorchEngine.from_directory(directory, precision="fp32", threads=1)

    async def work(engine: TorchEngine) -> None:
        for ids in ((), (0,) * (CONTEXT + 1), (10_000,)):
            with pytest.raises(RequestError, match="input"):
                await engine.embed("bad", ids)

    over(engine, work)
    with pytest.raises(EngineError):
        asyncio.run(engine.embed("late", (1,)))


def test_the_route_takes_every_form_of_input_and_both_encodings(directory: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    plain = TorchEngine.from_directory(directory, precision="fp32")._model
    words = ["the quick brown fox", "def add"]
    ids = [tuple(tokenizer(word)["input_ids"]) for word in words]

    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        async def ask(given: Any, **fields: Any) -> Any:
            answer = await client.post("/v1/embeddings", json={"model": "tiny", "input": given, **fields})
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-tandem-run-id"] == "run-1"
            return answer.json()

        whole = await ask(words, user="someone", dimensions=64, encoding_format="float")
        assert whole["usage"] == dict.fromkeys(("prompt_tokens", "total_tokens"), sum(map(len, ids)))
        assert (whole["object"], whole["model"]) == ("list", "tiny@3")
        assert [(part["object"], part["index"]) for part in whole["data"]] == [("embedding", 0), ("embedding", 1)]
        for part, own in zip(whole["data"], ids, strict=True):
            np.testing.assert_allclose(part["embedding"], expected(plain, own), atol=1e-4)
        for given in (words[0], list(ids[0]), [list(ids[0])]):
            alone = await ask(given)
            np.testing.assert_allclose(alone["data"][0]["embedding"], whole["data"][0]["embedding"], atol=1e-5)
        coded = (await ask(words, encoding_format="base64"))["data"][1]["embedding"]
        vector = np.frombuffer(base64.b64decode(coded), "<f4")
        np.testing.assert_allclose(vector, whole["data"][1]["embedding"], atol=1e-5)
        assert np.linalg.norm(vector) == pytest.approx(1)

    run(directory, scenario)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"input": ""}, "input", "is empty"),
        ({"input": []}, "input", "no list empty"),
        ({"input": ["a", ""]}, "input[1]", "is empty"),
        ({"input": ["a", [1]]}, "input", "given"),
        ({"input": [1, -1]}, "input", "given"),
        ({"input": [5000]}, "input", "outside the vocabulary"),
        ({"input": [0]}, "input", "no direction"),  # padding
        ({"input": ["a", "b " * 200]}, "input[1]", "context is 128"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
        ({"input": "a", "dimensions": 32}, "dimensions", "64 numbers"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "base64"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "not supported"),
        ({"input": "a", "input_type": "query"}, "input_type", "unknown parameter"),
        ({"input": "a", "normalize": False}, "normalize", "not supported"),
        ({"input": "a", "truncate": "END"}, "truncate", "not supported"),
        ({"input": "a", "add_special_tokens": False}, "add_special_tokens", "not supported"),
        ({}, "input", "required"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    directory: Path, fields: dict[str, Any], param: str, says: str
) -> None:
    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        answer = await client.post("/v1/embeddings", json={"model": "tiny", **fields})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param)
        assert says in error["message"]

    run(directory, scenario)


def test_only_text_models_of_engines_that_can_make_embeddings(directory: Path) -> None:
    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        answer = await client.post("/v1/embeddings", json={"model": "digits", "input": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_task")

    run(directory, scenario)


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        ("auto", {"pooling": "mean", "normalized": True}),
        ({"name": "torch", "pooling": "last"}, {"pooling": "last", "normalized": True}),
        ("vllm", None),
    ],
)
def test_the_model_card_tells_how_vectors_are_made(directory: Path, engine: Any, told: Any) -> None:
    spec = ServeSpec.model_validate({"models": {"tiny": {"model": str(directory), "engine": engine}}})
    assert plan.resolve(spec)[0].details["embeddings"] == told


class Plain:
    """An engine that makes no embeddings."""

    def __init__(self, engine: TorchEngine) -> None:
        self.tokenizer = engine.tokenizer


def test_an_engine_that_makes_none_says_so(directory: Path) -> None:
    engine: Any = Plain(TorchEngine.from_directory(directory, precision="fp32"))
    replica = GenerativeReplica(engine, Identity("1", None), {})
    refused = asyncio.run(replica.embed(EmbedCall("1", ("a",))))
    assert isinstance(refused, Refused)
    assert (refused.status, refused.code) == (400, "unsupported_task")
