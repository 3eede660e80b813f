"""/v1/audio/transcriptions over a real engine, asked by httpx and by openai's own client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import torch

from jobs.tasks.speech_recognition import SpeechRecognition
from serve.api import forms, routes, transcriptions
from serve.api.admission import Admission
from serve.api.body import ApiError
from serve.api.doorkeeper import KeyDoorkeeper
from serve.api.gateway import Gateway, ModelCard
from serve.api.openapi.document import document
from serve.api.own_rates import OwnRates
from serve.deploy import plan
from serve.fair.turns import Turns
from serve.keys.directory import Directory
from serve.keys.limits import Limits
from serve.keys.meter import Meter, today
from serve.keys.store import Store
from serve.spec import ServeSpec
from tests.support import predictive, tones
from tracking import manifest

URL = "/v1/audio/transcriptions"
CARD = ModelCard("speech", "speech-recognition", "1", False, 1700000000, {"transcribes": True})
FILE = tones.wav(tones.spoken("ab"))
Scenario = Callable[[httpx.AsyncClient, Any], Awaitable[None]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Listening(SpeechRecognition):
    """Writes down how long recordings are: what the way from a form to the task and back does is to be seen."""

    def predict(self, model: Any, instances: list[Any]) -> list[dict[str, Any]]:
        return [{**each, "text": f"{each['seconds']:.2f} s"} for each in super().predict(model, instances)]


@pytest.fixture(scope="module")
def loaded() -> tuple[SpeechRecognition, Any]:
    torch.manual_seed(0)
    task = Listening()
    task.fit(task.observe([{"audio": tones.wav(tones.spoken("abab")), "text": "abab"}]))
    return task, task.build("crnn", {"hidden_size": 8, "num_hidden_layers": 1}).eval()


def run(loaded: tuple[SpeechRecognition, Any], scenario: Scenario) -> None:
    """Run a scenario against a gateway with `speech`, `shapes`, which hears nothing, and a text model."""

    async def inside() -> None:
        replica = predictive.replica(*loaded)
        await replica.start()
        front, backend = predictive.gateway({"speech": replica})
        front.catalog = {**front.catalog, "speech": CARD}
        transport = httpx.ASGITransport(routes.build(lambda: front), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            await scenario(client, backend)
        await replica.stop()

    asyncio.run(inside())


def files(content: bytes = FILE) -> dict[str, Any]:
    return {"file": ("../../etc/said.wav", content, "audio/wav")}


def test_a_recording_is_written_down_as_json_and_as_text(loaded: Any) -> None:
    async def scenario(client: httpx.AsyncClient, _: Any) -> None:
        answer = await client.post(URL, data={"model": "speech"}, files=files())
        assert answer.status_code == 200, answer.text
        assert answer.json() == {"text": "0.42 s", "usage": {"type": "duration", "seconds": 1}}
        assert answer.headers["x-tandem-model-version"] == "1"
        form = {"model": "speech", "response_format": "text", "temperature": "0", "prompt": "", "user": "me"}
        plain = await client.post(URL, data=form, files=files(tones.flac(tones.spoken("a", rate=16_000), 16_000)))
        assert (plain.status_code, plain.text) == (200, "0.24 s\n")
        assert plain.headers["content-type"] == "text/plain; charset=utf-8"

    run(loaded, scenario)


def test_openais_client_is_answered(loaded: Any) -> None:
    async def scenario(client: httpx.AsyncClient, _: Any) -> None:
        openai_client = openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=client)
        create = openai_client.audio.transcriptions.create
        made = await create(model="speech", file=("said.wav", FILE))
        assert made.text == "0.42 s"
        assert made.usage.seconds == 1
        assert await create(model="speech", file=("said.wav", FILE), response_format="text") == "0.42 s\n"
        with pytest.raises(openai.BadRequestError, match=r"language = .* is not supported"):
            await create(model="speech", file=("said.wav", FILE), language="fr")

    run(loaded, scenario)


@pytest.mark.parametrize(
    ("form", "content", "param", "said"),
    [
        ({"response_format": "srt"}, FILE, "response_format", "srt"),
        ({"response_format": "verbose_json"}, FILE, "response_format", "verbose_json"),
        ({"language": "en"}, FILE, "language", "has learned"),
        ({"prompt": "names"}, FILE, "prompt", "not supported"),
        ({"temperature": "0.4"}, FILE, "temperature", "most likely"),
        ({"stream": "true"}, FILE, "stream", "not supported"),
        ({"timestamp_granularities[]": "word"}, FILE, "timestamp_granularities[]", "not supported"),
        ({"colour": "blue"}, FILE, "colour", "unknown parameter"),
        ({}, b"", "file", "is empty"),
        ({}, b"no sound", "file", "no sound file"),
        ({}, FILE[:-50], "file", "cut off"),
        ({}, tones.wav(tones.spoken("ababab")), "file", "at most 0.78 s"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    loaded: Any, form: Any, content: bytes, param: str, said: str
) -> None:
    async def scenario(client: httpx.AsyncClient, _: Any) -> None:
        answer = await client.post(URL, data={"model": "speech", **form}, files=files(content))
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param), error
        assert said in error["message"]

    run(loaded, scenario)


def test_models_and_bodies_that_are_none_of_this_route(loaded: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Any) -> None:
        for form, content, status, said in (
            ({"model": "nobody"}, files(), 404, "does not exist"),
            ({"model": "chat"}, files(), 400, "writes no recordings down"),
            ({}, files(), 400, "model is required"),
            ({"model": "speech", "file": "said.wav"}, {}, 400, "filename"),
            ({"model": "speech"}, {**files(), "other": b"x"}, 400, "unknown parameter other"),
        ):
            answer = await client.post(URL, files={**{name: (None, value) for name, value in form.items()}, **content})
            assert (answer.status_code, said in answer.text) == (status, True), answer.text
        json = await client.post(URL, json={"model": "speech"})
        assert json.status_code == 400
        assert "must be a form" in json.json()["error"]["message"]
        large = await client.post(URL, data={"model": "speech"}, files=files(bytes(predictive.MOST)))
        assert large.status_code == 413
        backend.failure = ApiError(503, "no replica", code="not_ready")
        assert (await client.post(URL, data={"model": "speech"}, files=files())).status_code == 503

    run(loaded, scenario)


def test_the_inference_protocol_takes_files_and_samples(loaded: Any) -> None:
    async def scenario(client: httpx.AsyncClient, _: Any) -> None:
        import base64

        of_file = {"name": "audio", "datatype": "BYTES", "shape": [2], "parameters": {"content_type": "base64"}}
        encoded = base64.b64encode(FILE).decode()
        answer = await client.post(
            "/v2/models/speech/infer", json={"inputs": [{**of_file, "data": [encoded, encoded]}]}
        )
        assert answer.status_code == 200, answer.text
        assert {part["name"]: part["data"] for part in answer.json()["outputs"]}["text"] == ["0.42 s"] * 2
        sound = tones.spoken("a").tolist()
        samples = {"name": "audio", "datatype": "FP32", "shape": [1, len(sound)], "data": sound}
        answer = await client.post("/v2/models/speech/infer", json={"inputs": [samples]})
        assert answer.status_code == 200, answer.text
        assert answer.json()["outputs"][0]["data"] == ["0.24 s"]

    run(loaded, scenario)


def test_keys_are_asked_for_and_a_recording_counts_as_a_row(loaded: Any, tmp_path: Path) -> None:
    async def inside() -> None:
        replica = predictive.replica(*loaded)
        await replica.start()
        _, backend = predictive.gateway({"speech": replica})
        store = Store(f"sqlite:///{tmp_path / 'keys.db'}")
        meter = Meter(store, tmp_path / "usage")
        front = Gateway(
            backend,
            predictive.MOST,
            3,
            admission=Admission(OwnRates(), meter, lambda model: Turns(4, 100, 100), 5.0),
            doorkeeper=KeyDoorkeeper(Directory(store.find)),
        )
        front.catalog = {"speech": CARD}
        transport = httpx.ASGITransport(routes.build(lambda: front), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            ask = partial(client.post, URL, data={"model": "speech"}, files=files())
            assert (await ask()).status_code == 401
            alice, bob = (
                {"authorization": f"Bearer {store.create(name, Limits(models=models)).text}"}
                for name, models in (("alice", None), ("bob", ["other"]))
            )
            assert (await ask(headers=alice)).status_code == 200
            assert (await ask(headers=bob)).status_code == 404
            await meter._exchange([])
            used = store.usage("alice", today(), today())
            assert [(each.requests, each.prompt_tokens, each.generated_tokens) for each in used] == [(1, 1, 0)]
        await meter.stop()
        await replica.stop()

    asyncio.run(inside())


# -- forms -------------------------------------------------------------------------------------------------------------

KIND = "multipart/form-data; boundary=xyz"


def form(*parts: str) -> bytes:
    return "".join(f"--xyz\r\n{part}\r\n" for part in parts).encode() + b"--xyz--\r\n"


def test_a_form_is_read_as_it_stands() -> None:
    raw = form(
        'Content-Disposition: form-data; name="a"\r\n\r\nä b\r\n',
        'content-disposition: form-data; name="file"; filename="x.wav"\r\nContent-Type: audio/wav\r\n\r\n\r\n--xy',
        'Content-Disposition: form-data; name="k[]"\r\n\r\n1',
        'Content-Disposition: form-data; name="k[]"\r\n\r\n2',
        'Content-Disposition: form-data; name="k[]"\r\n\r\n',
    )
    assert forms.read(raw, KIND) == {
        "a": "ä b\r\n",
        "file": forms.FormFile("x.wav", b"\r\n--xy"),
        "k[]": ["1", "2", ""],
    }


@pytest.mark.parametrize(
    ("raw", "kind", "said"),
    [
        (b"", KIND, "ends too early"),
        (form('Content-Disposition: form-data; name="a"\r\n\r\nb')[:-8], KIND, "ends too early"),
        (b"nonsense", KIND, "no valid form"),
        (form("Content-Disposition: form-data\r\n\r\nb"), KIND, "no name"),
        (form(*['Content-Disposition: form-data; name="a"\r\n\r\nb'] * 65), KIND, "more than 64 parts"),
        (form('Content-Disposition: form-data; name="a"\r\n\r\n' + "b" * 70_000), KIND, "longer than"),
        (b'--xyz\r\nContent-Disposition: form-data; name="a"\r\n\r\n\xff\r\n--xyz--\r\n', KIND, "no text in UTF-8"),
        (b"{}", "application/json", "must be a form"),
        (b"{}", "multipart/form-data", "must be a form"),
        (b"{}", None, "must be a form"),
    ],
)
def test_what_is_no_form_is_refused(raw: bytes, kind: str | None, said: str) -> None:
    with pytest.raises(ApiError, match=said) as refused:
        forms.read(raw, kind)
    assert refused.value.status == 400


def test_two_files_are_refused() -> None:
    file = forms.FormFile("a", b"x")
    with pytest.raises(ApiError, match="one recording"):
        transcriptions.parse({"model": "m", "file": [file, file]})


def test_a_served_speech_model_says_that_it_transcribes(tmp_path: Path, loaded: Any) -> None:
    task, model = loaded
    model.save_pretrained(tmp_path / "speech")
    task.save(tmp_path / "speech")
    manifest.write(
        tmp_path / "speech", manifest.ModelManifest(name="speech", task="speech-recognition", architecture="crnn")
    )
    spec = ServeSpec.model_validate({"models": {"speech": {"model": str(tmp_path / "speech")}}})
    (served,) = plan.resolve(spec)
    assert served.details["transcribes"] is True


def test_the_route_is_described() -> None:
    told = document([("post", URL)])
    schema = told["components"]["schemas"]["TranscriptionRequest"]
    assert list(told["paths"][URL]["post"]["requestBody"]["content"]) == ["multipart/form-data"]
    assert set(told["paths"][URL]["post"]["responses"]["200"]["content"]) == {"application/json", "text/plain"}
    assert schema["required"] == ["model", "file"]
    whole = {**schema, "components": told["components"]}
    described = jsonschema.Draft202012Validator(whole)
    assert described.is_valid({"model": "m", "file": "bytes", "response_format": "text", "temperature": "0"})
    for wrong in ({"response_format": "srt"}, {"language": "en"}, {"temperature": "1"}, {"colour": "blue"}):
        assert not described.is_valid({"model": "m", "file": "bytes", **wrong})
