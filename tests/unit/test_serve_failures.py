"""What fails inside is for the log; clients get a sentence and the id it stands under. Encoders do not start as LMs."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from serve.api import routes
from serve.api.gateway import Gateway
from serve.engines.protocol import Delta, EngineError, EngineLoad, GenerationRequest
from serve.engines.replica import GenerativeReplica, PredictiveReplica
from serve.engines.torch.check import UnsupportedArchitecture
from serve.engines.torch.torch_engine import TorchEngine
from serve.wire import EmbedCall, GenerateCall, Identity, InferCall, Opened, Refused
from tests.support import tiny_models
from tests.support.predictive import CHAT

INSIDE = "RuntimeError('CUDA error at /opt/secret/kernel.cu:12')"


class Failing:
    """An engine whose work fails."""

    max_context = 64
    embedding_size = 4

    def __init__(self) -> None:
        self.tokenizer = tiny_models.byte_tokenizer()

    async def check(self, request: GenerationRequest) -> None: ...

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        yield Delta("a", (1,))
        raise EngineError(INSIDE)

    async def embed(self, request_id: str, prompt_token_ids: tuple[int, ...]) -> Any:
        raise EngineError(INSIDE)

    async def predict(self, instance: Any) -> dict[str, Any]:
        raise EngineError(INSIDE)

    def load(self) -> EngineLoad:
        return EngineLoad(1, 0, 0, 0, 0.0)


def failures(engine: Any) -> list[Refused]:
    """Return how the failure of an engine is told, by each kind of call."""

    async def inside() -> list[Any]:
        texts = GenerativeReplica(engine, Identity("1", None), {})
        messages = [each async for each in texts.generate(GenerateCall("call-1", "abc", max_tokens=4))]
        assert isinstance(messages[0], Opened)
        predicting = PredictiveReplica(
            engine, [{"name": "text", "datatype": "BYTES", "shape": [-1]}], Identity("1", None)
        )
        infer = await predicting.infer(InferCall("call-3", {"text": ["a"]}))
        return [messages[-1], await texts.embed(EmbedCall("call-2", ("abc",))), infer]

    return asyncio.run(inside())


def test_a_client_gets_a_sentence_and_an_id_and_the_log_has_the_reason_under_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR, "serve"):
        refusals = failures(Failing())
    for number, refused in enumerate(refusals, 1):
        assert (refused.status, refused.code) == (500, "engine_failed")
        assert refused.message.endswith(f"its log has the reason, under call-{number}")
        assert "secret" not in refused.message
        assert f"request call-{number}: {INSIDE}" in caplog.messages
    assert [refused.lost for refused in refusals] == [True, False, False]  # a text can go on at another replica


@pytest.mark.parametrize("layers", [1, 2])
def test_an_encoder_does_not_start_as_a_causal_model(layers: int) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 320}
    config = AutoConfig.for_model("bert", num_hidden_layers=layers, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    engine = TorchEngine(AutoModelForCausalLM.from_config(config).eval(), tiny_models.tokenizer(), precision="fp32")
    with pytest.raises(UnsupportedArchitecture, match=r"sees the tokens that it is to predict.*text-classification"):
        asyncio.run(engine.start())


class Broken:
    """A backend that fails in a way that nobody expected."""

    async def states(self) -> Any:
        raise RuntimeError(INSIDE)


@pytest.mark.parametrize("path", ["/status", "/v2/models/chat"])
def test_what_nobody_expected_is_under_an_id_too(caplog: pytest.LogCaptureFixture, path: str) -> None:
    backend: Any = Broken()
    gateway = Gateway(backend, max_body_bytes=100, max_prompts=1)
    gateway.catalog = {"chat": CHAT}

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(routes.build(lambda: gateway), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    answer = asyncio.run(asked())
    assert answer.status_code == 500
    assert "secret" not in answer.text
    found = re.search(r"under (req-[0-9a-f]{24})", answer.text)
    assert found is not None
    (record,) = [record for record in caplog.records if record.getMessage().startswith(f"{found[1]}: GET {path}")]
    assert record.exc_info is not None
    assert INSIDE in str(record.exc_info[1])
