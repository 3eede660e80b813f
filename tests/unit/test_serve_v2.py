"""Open Inference Protocol over HTTP, on real models: metadata, versions, tensors, files, errors, and no path opened."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from serve.api.body import ApiError
from tests.support import predictive
from tests.support.predictive import Predicting, Scenario
from tests.support.sinks import touched

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    return predictive.models(tmp_path_factory.mktemp("shapes"))


@pytest.fixture
def serve(loaded: Any) -> Any:
    def with_models(scenario: Scenario) -> None:
        predictive.run(loaded, scenario)

    return with_models


def part(**fields: Any) -> dict[str, Any]:
    return {"name": "image", "shape": [2, 8, 8], "datatype": "UINT8", "data": PIXELS.tolist(), **fields}


def png(pixels: np.ndarray = PIXELS[0]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def files(*contents: bytes | str, **fields: Any) -> dict[str, Any]:
    texts = [c if isinstance(c, str) else base64.b64encode(c).decode() for c in contents]
    given = {"shape": [len(texts)], "datatype": "BYTES", "data": texts, "parameters": {"content_type": "base64"}}
    return part(**{**given, **fields})


async def ask(client: httpx.AsyncClient, *inputs: Any, model: str = "shapes", **fields: Any) -> httpx.Response:
    return await client.post(f"/v2/models/{model}/infer", json={"inputs": inputs, **fields})


async def labels(client: httpx.AsyncClient, *inputs: Any, model: str = "shapes", **fields: Any) -> list[str]:
    answer = await ask(client, *inputs, model=model, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["outputs"][0]["data"]


async def refused(client: httpx.AsyncClient, *inputs: Any, model: str = "shapes", **fields: Any) -> str:
    answer = await ask(client, *inputs, model=model, **fields)
    assert answer.status_code == 400, answer.text
    assert list(answer.json()) == ["error"]
    return str(answer.json()["error"])


def test_metadata(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        described = (await client.get("/v2/models/shapes")).json()
        assert (described["name"], described["versions"]) == ("shapes", ["1"])
        (image,) = described["inputs"]
        assert (image["datatype"], image["shape"]) == ("UINT8", [-1, 8, 8, 1])
        assert image["parameters"] == {"content_types": ["np", "base64"]}
        answer = (await ask(client, part())).json()
        for told, made in zip(described["outputs"], answer["outputs"], strict=True):
            assert (told["name"], told["datatype"]) == (made["name"], made["datatype"])
            assert told["shape"] == [-1, *made["shape"][1:]]
            assert told.get("parameters") == made.get("parameters")
        assert [output["name"] for output in (await client.get("/v2/models/opinions")).json()["outputs"]] == [
            "label", "score", "scores", "truncated"]  # fmt: skip
        assert (await client.get("/v2")).json()["extensions"] == ["binary_tensor_data"]

    serve(scenario)


def test_versions(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        plain, versioned = "/v2/models/shapes", "/v2/models/shapes/versions/1"
        for path in ("", "/ready"):
            assert (await client.get(versioned + path)).json() == (await client.get(plain + path)).json()
        body = {"inputs": [part()]}
        answers = [await client.post(f"{path}/infer", json=body) for path in (plain, versioned)]
        assert answers[0].json() == answers[1].json()
        for method, path in (("GET", ""), ("GET", "/ready"), ("POST", "/infer")):
            answer = await client.request(method, f"/v2/models/shapes/versions/2{path}", json=body)
            assert answer.status_code == 404
            assert answer.json() == {"error": "'shapes' has no version '2' here; served: 1"}

    serve(scenario)


def index(client: httpx.AsyncClient, body: Any) -> Any:
    return client.post("/v2/repository/index", json=body)


def test_the_repository_is_listed(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        listed = (await client.post("/v2/repository/index")).json()
        assert listed[0] == {"name": "shapes", "version": "1", "state": "READY", "reason": ""}
        del backend.replicas["opinions"]
        states = {each["name"]: each["state"] for each in (await index(client, {})).json()}
        assert (states["shapes"], states["opinions"]) == ("READY", "UNAVAILABLE")
        assert {**states, "opinions": "READY"} != states
        ready = [each["name"] for each in (await index(client, {"ready": True})).json()]
        assert ready == [name for name, state in states.items() if state == "READY"]
        assert len((await index(client, {"ready": False})).json()) == len(states)
        for wrong in ({"ready": 1}, {"redy": True}, []):
            assert (await index(client, wrong)).status_code == 400

    serve(scenario)


def test_the_same_image_in_every_form(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        expected = await labels(client, part())
        whole = PIXELS[:, :, :, None]
        assert await labels(client, part(shape=[2, 8, 8, 1], data=whole.tolist())) == expected
        assert await labels(client, part(shape=[2, 8, 8, 1])) == expected
        assert await labels(client, part(data=PIXELS.ravel().tolist())) == expected
        assert await labels(client, part(datatype="INT64")) == expected
        assert await labels(client, part(parameters=None), id=None, parameters=None, outputs=None) == expected
        both = [png(PIXELS[0]), png(PIXELS[1])]
        assert await labels(client, files(*both)) == expected
        nested = files(*both)
        assert (
            await labels(client, {**nested, "shape": [2, 1], "data": [[text] for text in nested["data"]]}) == expected
        )

    serve(scenario)


def test_binary_requests(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        expected = (await ask(client, part())).json()["outputs"]
        raw = b"".join(len(file).to_bytes(4, "little") + file for file in (png(PIXELS[0]), png(PIXELS[1])))
        forms = [("UINT8", [2, 8, 8, 1], PIXELS.tobytes()), ("INT32", [2, 8, 8], PIXELS.astype("<i4").tobytes()),
                 ("BYTES", [2], raw)]  # fmt: skip
        for datatype, shape, data in forms:
            image = {
                "name": "image",
                "shape": shape,
                "datatype": datatype,
                "parameters": {"binary_data_size": len(data)},
            }
            head = json.dumps({"inputs": [image], "parameters": {"binary_data_output": True}}).encode()
            headers = {"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"}
            answer = await client.post("/v2/models/shapes/infer", content=head + data, headers=headers)
            assert answer.status_code == 200, answer.text
            length = int(answer.headers["inference-header-content-length"])
            told = json.loads(answer.content[:length])["outputs"]
            sizes = [output["parameters"]["binary_data_size"] for output in told]
            assert len(answer.content) == length + sum(sizes)
            scores = np.frombuffer(answer.content[-sizes[2] :], "<f4")
            assert scores.tolist() == pytest.approx(expected[2]["data"])
            assert told[2]["parameters"]["labels"] == ["0", "1", "2"]

    serve(scenario)


def test_texts(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        text = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a good film", "a bad film"]}
        expected = await labels(client, text, model="opinions")
        nested = {**text, "shape": [2, 1], "data": [["a good film"], ["a bad film"]]}
        assert await labels(client, nested, model="opinions") == expected
        coded = [base64.b64encode(word.encode()).decode() for word in text["data"]]
        in_base64 = {**text, "data": coded, "parameters": {"content_type": "base64"}}
        assert await labels(client, in_base64, model="opinions") == expected
        for wrong, said in [
            ({**text, "data": [1, 2]}, "value 0 is 1"),
            ({**text, "data": ["a", ""]}, "row 1: an input holds ''"),
            ({**text, "datatype": "INT8", "data": [1, 2]}, "is INT8, the model takes BYTES"),
            ({**text, "shape": [1, 2]}, "shape [1, 2]"),
            ({**text, "shape": [1], "data": ["//8="], "parameters": {"content_type": "base64"}}, "not UTF-8"),
        ]:
            assert said in await refused(client, wrong, model="opinions")

    serve(scenario)


def test_tensors_that_ask_another_question(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        scaled, sixteenths = (PIXELS / 255).tolist(), np.rint(PIXELS / 16.0).tolist()
        big = png(np.zeros((9000, 9000), np.uint8))
        for wrong, said in [
            (part(datatype="FP32", data=scaled), "is FP32, the model takes UINT8"),
            (part(datatype="FP32", data=sixteenths), "is FP32, the model takes UINT8"),
            (part(datatype="INT64", data=(PIXELS - 300.0).astype(int).tolist()), "UINT8 holds 0 to 255"),
            (part(datatype="BOOL", data=(PIXELS > 9).tolist()), "is BOOL, the model takes UINT8"),
            (part(shape=[1, 2, 8, 8]), "the model takes [-1, 8, 8, 1]"),
            (part(shape=[8, 2, 8], data=PIXELS.ravel().tolist()), "the model takes [-1, 8, 8, 1]"),
            (part(name="picture"), "the inputs must be image; given: picture"),
            (files("AAAA"), "this is no image in PNG"),
            (files(png(), png()[:60]), "row 1: cannot read an image"),
            (files(b""), "no bytes"),
            (files(big), "more than"),
        ]:
            message = await refused(client, wrong)
            assert said in message
            assert "object at" not in message

    serve(scenario)


def test_outputs_are_those_asked_for(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        answer = (await ask(client, part(), outputs=[{"name": "score"}], id="7")).json()
        assert [output["name"] for output in answer["outputs"]] == ["score"]
        assert answer["id"] == "7"
        assert "no output 'logits'" in await refused(client, part(), outputs=[{"name": "logits"}])

    serve(scenario)


def test_every_error_is_the_protocol_s(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        infer = "/v2/models/shapes/infer"
        for status, request in [
            (404, client.post("/v2/models/nope/infer", json={"inputs": []})),
            (404, client.get("/v2/models/nope")),
            (404, client.get("/v2/models/nope/ready")),
            (404, client.get("/v2/models/org/nope")),
            (404, client.post("/v2/models/org/nope/infer")),
            (404, client.get("/v2/nothing")),
            (404, client.get("/v2/models/shapes/config")),
            (405, client.get(infer)),
            (405, client.post("/v2/models/shapes")),
            (405, client.options(infer)),
            (400, client.post(infer, content=b"")),
            (400, client.post(infer, content=b"[]")),
            (400, client.post(infer, json={})),
            (400, client.post("/v2/models/chat/infer", json={"inputs": [part()]})),
            (413, client.post(infer, content=b" " * (predictive.MOST + 1))),
            (415, client.post(infer, content=b"{}", headers={"content-encoding": "br"})),
        ]:
            answer = await request
            assert answer.status_code == status, answer.text
            assert list(answer.json()) == ["error"]
            assert isinstance(answer.json()["error"], str)
        for failure, status in ((ApiError(429, "busy", headers={"retry-after": "2"}), 429), (KeyError("x"), 500)):
            backend.failure = failure
            answer = await ask(client, part())
            assert answer.status_code == status
            assert isinstance(answer.json()["error"], str)
            assert "KeyError" not in answer.text

    serve(scenario)


class Shout:
    """A task of the user's own: no outputs described, several kinds of them."""

    def inputs(self) -> list[dict[str, Any]]:
        return [{"name": "word", "datatype": "BYTES", "shape": [-1]}]

    def outputs(self) -> list[dict[str, Any]]:
        return []

    def predict(self, model: Any, instances: list[Any]) -> list[dict[str, Any]]:
        words = [each.decode() if isinstance(each, bytes) else each for each in instances]
        return [{"loud": word.upper(), "length": len(word), "halves": [len(word) / 2, 1.0]} for word in words]


class Picky(Shout):
    def predict(self, model: Any, instances: list[Any]) -> list[dict[str, Any]]:
        if "a" in instances:
            raise RuntimeError("not this one")
        return super().predict(model, instances)


def test_the_outputs_of_a_task_of_one_s_own_are_found_out() -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        described = (await client.get("/v2/models/shout")).json()["outputs"]
        assert described == [
            {"name": "loud", "datatype": "BYTES", "shape": [-1]},
            {"name": "length", "datatype": "INT64", "shape": [-1]},
            {"name": "halves", "datatype": "FP32", "shape": [-1, 2]},
        ]
        assert (await client.get("/v2/models/picky")).json()["outputs"] == []
        word = {"name": "word", "datatype": "BYTES", "shape": [1], "data": ["hey"]}
        assert (await ask(client, word, model="picky")).json()["outputs"][2]["data"] == [1.5, 1.0]

    predictive.run({"shout": (Shout(), None), "picky": (Picky(), None)}, scenario)


def test_a_task_that_answers_otherwise_than_its_parent_is_described_as_it_answers(loaded: Any) -> None:
    task, model = loaded["shapes"]

    class Parity(type(task)):  # type: ignore[misc]
        def predict(self, model: Any, instances: Any) -> list[dict[str, Any]]:
            return [{"odd": int(each["label"]) % 2 == 1} for each in super().predict(model, instances)]

    own = Parity()
    vars(own).update(vars(task))

    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        described = (await client.get("/v2/models/parity")).json()["outputs"]
        assert described == [{"name": "odd", "datatype": "BOOL", "shape": [-1]}]

    predictive.run({"parity": (own, model)}, scenario)


@pytest.mark.parametrize("form", ["{}", "file://{}", "http://127.0.0.1:1{}", "~{}", "./../../../../../..{}"])
def test_no_path_is_opened_that_a_client_names(serve: Any, tmp_path: Path, form: str) -> None:
    sink = tmp_path / "sink.png"
    os.mkfifo(sink)  # opening it would block the engine for everyone
    named = form.format(sink)
    coded = base64.b64encode(named.encode()).decode()

    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        text = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [named]}
        message = await refused(client, files(named, parameters=None))
        assert '"parameters": {"content_type": "base64"}' in message
        for wrong in (
            files(coded),
            files(named),
            files(named, parameters={"content_type": "str"}),
            part(shape=[1], data=[named]),
            part(shape=[1], data=[{"path": named, "bytes": None}]),
            part(name=named),
        ):
            await refused(client, wrong)
        raw = len(named).to_bytes(4, "little") + named.encode()
        image = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
        head = json.dumps({"inputs": [image]}).encode()
        headers = {"inference-header-content-length": str(len(head))}
        answer = await client.post("/v2/models/shapes/infer", content=head + raw, headers=headers)
        assert answer.status_code == 400
        assert (await ask(client, text, model="opinions")).status_code == 200  # to it, a path is a text
        assert (await client.get(f"/v2/models/{named}")).status_code in (400, 404)

    with touched("sink") as opened:
        serve(scenario)
    assert opened == []
