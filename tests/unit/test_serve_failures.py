"""What fails inside is for the log; clients get a sentence and the id it stands under. Encoders do not start as LMs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from serve.engines.protocol import Delta, EngineError, EngineLoad, GenerationRequest
from serve.engines.replica import GenerativeReplica, PredictiveReplica
from serve.engines.torch.check import UnsupportedArchitecture
from serve.engines.torch.torch_engine import TorchEngine
from serve.wire import EmbedCall, GenerateCall, Identity, InferCall, Opened, Refused
from tests.support import tiny_models

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


@pytest.mark.parametrize("layers", [1, 2])
def test_an_encoder_does_not_start_as_a_causal_model(layers: int) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 320}
    config = AutoConfig.for_model("bert", num_hidden_layers=layers, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    engine = TorchEngine(AutoModelForCausalLM.from_config(config).eval(), tiny_models.tokenizer(), precision="fp32")
    with pytest.raises(UnsupportedArchitecture, match=r"sees the tokens that it is to predict.*text-classification"):
        asyncio.run(engine.start())
