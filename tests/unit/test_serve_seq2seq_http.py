"""A translator from its directory to HTTP: chat, streamed and by beams, completions, the Open Inference Protocol."""

import asyncio
import json

import httpx
import pytest

from cluster.errors import UserError
from serve.api import routes
from serve.api.gateway import Gateway, ModelCard
from serve.engines.seq2seq.load import load
from serve.engines.table import EngineOptions, ReplicaSetup
from serve.wire import Identity
from tests.support.in_process import InProcess
from tests.unit.test_jobs_seq2seq import learned
from tests.unit.test_serve_seq2seq import model_of

SOURCE = "one two three"


class Translating(InProcess):
    """A backend of one replica that predicts, too."""

    async def infer(self, model, call):
        return await self.replica.infer(call)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder, task = tmp_path_factory.mktemp("model"), learned(prefix="four ", max_target_length=12)
    model = model_of(task, "t5")
    model.save_pretrained(folder)
    task.save(folder)
    return folder


def setup(directory, **changed):
    given = {"task": "seq2seq", "options": EngineOptions(), "precision": "fp32", "max_context": None}
    given |= {"max_batch": 4, "threads": 1, **changed}
    return ReplicaSetup(directory=directory, identity=Identity("3", "run-1"), **given)


def asked(directory, scenario, **details):
    async def inside():
        replica = load(setup(directory))
        await replica.start()
        gateway = Gateway(Translating(replica), max_body_bytes=20_000, max_prompts=3)
        gateway.catalog = {"tiny": ModelCard("tiny", "seq2seq", "3", True, 0, details)}
        transport = httpx.ASGITransport(routes.build(lambda: gateway), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            try:
                return await scenario(client)
            finally:
                await replica.stop()

    return asyncio.run(inside())


def body(**more):
    return {"model": "tiny", "messages": [{"role": "user", "content": SOURCE}], **more}


def test_every_route_gives_the_same_translation(directory):
    async def scenario(client):
        chat = await client.post("/v1/chat/completions", json=body())
        stream = await client.post(
            "/v1/chat/completions", json=body(stream=True, stream_options={"include_usage": True})
        )
        plain = await client.post("/v1/completions", json={"model": "tiny", "prompt": SOURCE, "max_tokens": 12})
        tensor = {"name": "text", "datatype": "BYTES", "shape": [2], "data": [SOURCE, "five"]}
        infer = await client.post("/v2/models/tiny/infer", json={"inputs": [tensor]})
        described = await client.get("/v2/models/tiny")
        return [chat, stream, plain, infer, described]

    chat, stream, plain, infer, described = answers = asked(directory, scenario, infers=True)
    assert [each.status_code for each in answers] == [200] * 5, [each.text for each in answers]
    text = chat.json()["choices"][0]["message"]["content"]
    assert text
    events = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in events if each["choices"]) == text
    usage = chat.json()["usage"]
    assert events[-1]["usage"] == usage
    assert usage["prompt_tokens"] == len(learned().tokenizer(f"four {SOURCE}")["input_ids"])
    assert plain.json()["choices"][0]["text"] == text
    (output,) = infer.json()["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("text", "BYTES", [2])
    assert output["data"][0] == text
    assert described.json()["inputs"][0]["parameters"] == {"max_tokens": 16}


def test_a_beam_search_is_asked_for_and_a_stream_of_one_refused(directory):
    async def scenario(client):
        asks = (
            body(num_beams=4),
            body(num_beams=4, stream=True),
            body(num_beams=5),
            body(num_beams=2, temperature=0.7),
        )
        return [await client.post("/v1/chat/completions", json=each) for each in asks]

    found, *refused = asked(directory, scenario)
    assert found.status_code == 200, found.text
    assert found.json()["choices"][0]["finish_reason"] in ("stop", "length")
    assert [each.status_code for each in refused] == [400] * 3
    assert [each.json()["error"]["param"] for each in refused] == ["num_beams", "num_beams", "temperature"]


def test_what_only_predicts_by_its_card_is_asked_there(directory):
    async def scenario(client):
        tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [SOURCE]}
        return await client.post("/v2/models/tiny/infer", json={"inputs": [tensor]})

    refused = asked(directory, scenario)
    assert refused.status_code == 400
    assert "generates text" in refused.json()["error"]


def test_a_model_of_another_task_is_refused(directory):
    with pytest.raises(UserError, match="serves the task seq2seq and those that derive from it, not causal-lm"):
        load(setup(directory, task="causal-lm"))


def test_a_context_of_the_serve_spec_bounds_both_sides(directory):
    replica = load(setup(directory, max_context=5))
    assert replica.describe()["engine"]["max_source"] == replica.describe()["max_context"] == 5
    assert replica.describe()["inputs"][0]["parameters"] == {"max_tokens": 5}
