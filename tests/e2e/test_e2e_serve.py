"""An endpoint on a real cluster, from `up` to `down`: Ray Serve, HTTP, the official client, autoscaling."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import psutil
import pytest
import ray
from typer.testing import CliRunner

from cluster import connect, home
from cluster.connect import Connection
from cluster.errors import UserError
from cluster.precision import resolve, this_cpu
from serve import cli, endpoints
from serve.api import routes
from serve.api.callers import OPEN_PATHS
from serve.deploy import ray_serve_internals, succession
from serve.deploy.names import model_app
from serve.spec import GatewaySpec, HttpSpec, KeysSpec, ServeSpec
from tests.conftest import free_port
from tests.support import certificates, tiny_models
from tests.support.members import named
from tracking import registry

HELLO = [{"role": "user", "content": "hello"}]
STREAMS = 32
LONG = {"model": "tiny", "prompt": "a", "max_tokens": 500, "ignore_eos": True}


def spec(images: Path | None, **tiny: Any) -> ServeSpec:
    models = {
        "tiny": {
            "model": "models:/tiny@champion",
            "max_batch": 16,
            "max_queued": 32,
            "replicas": {"min": 1, "max": 2},
            "upscale_delay_s": 0.5,
            "downscale_delay_s": 2,
            **tiny,
        }
    }
    if images is not None:
        models["shapes"] = {"model": str(images), "resources": {"cpus_per_replica": 0.5}}
    return ServeSpec.model_validate({"models": models, "drain_s": 20, "start_timeout_s": 180})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.image_classifier(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def endpoint(cluster: Connection, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tiny_models.language_model(tmp_path_factory.mktemp("tiny"), context=1024)
    registry.register("tiny", directory, run_id=None, alias="champion")
    outcome = endpoints.up(spec(images), print)
    yield outcome["endpoint"]
    endpoints.down(print)


def forked(process: psutil.Process) -> bool:
    parent = process.parent()
    return parent is not None and "cluster.fork_server" in parent.cmdline()


@pytest.fixture(scope="module")
def client(endpoint: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0, timeout=60)


def test_chat_with_the_official_client(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12, temperature=0)
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=12, temperature=0, stream=True, stream_options=options
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content != ""
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12


def test_completions_with_the_official_client(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt=["for", "def"], max_tokens=5, temperature=0)
    stream = client.completions.create(model="tiny", prompt="def", max_tokens=5, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[1].text != ""


def test_errors_with_the_official_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.completions.create(model="tiny", prompt="a", suffix="b")
    assert (unsupported.value.code, unsupported.value.param) == ("unsupported_parameter", "suffix")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x " * 1200}], stream=True)
    assert long.value.code == "context_length_exceeded"


def test_choices_scores_and_structure_with_the_official_client(client: openai.OpenAI) -> None:
    choices = client.chat.completions.create(model="tiny", messages=HELLO, n=3, seed=1, max_tokens=8).choices
    assert len({choice.message.content for choice in choices}) == 3
    scored = client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=0, echo=True, logprobs=1).choices[0]
    assert scored.logprobs is not None
    assert scored.logprobs.token_logprobs is not None
    assert [value is None for value in scored.logprobs.token_logprobs] == [True, False, False]
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=200, response_format=wanted)
    assert json.loads(answer.choices[0].message.content or "")["a"] in ("x", "y")


def test_models_tell_their_origin(client: openai.OpenAI, endpoint: str) -> None:
    card = client.models.retrieve("tiny").model_dump()
    assert (card["version"], card["task"], card["run_id"]) == ("1", "causal-lm", "run-of-tiny")
    assert card["dataset"]["name"] == "sentences"
    assert card["evaluation"] == {"loss": 5.5}
    answer = client.completions.with_raw_response.create(model="tiny", prompt="a", max_tokens=1)
    assert answer.headers["x-tandem-model-version"] == "1"
    assert answer.headers["x-tandem-run-id"] == "run-of-tiny"
    assert httpx.get(f"{endpoint}/health").json()["status"] == "ok"


def test_inference(endpoint: str) -> None:
    described = httpx.get(f"{endpoint}/v2/models/shapes").json()
    taken = {"name": "image", "datatype": "UINT8", "shape": [-1, 8, 8, 1]}
    assert described["inputs"] == [{**taken, "parameters": {"content_types": ["np", "base64"]}}]
    part = {"name": "image", "shape": [3, 8, 8, 1], "datatype": "UINT8", "data": list(range(192))}
    answer = httpx.post(f"{endpoint}/v2/models/shapes/infer", json={"inputs": [part]}, timeout=60)
    outputs = {output["name"]: output for output in answer.json()["outputs"]}
    assert outputs["label"]["shape"] == [3]
    assert set(outputs["label"]["data"]) <= {"0", "1", "2"}
    assert outputs["scores"]["shape"] == [3, 3]
    assert sum(outputs["scores"]["data"]) == pytest.approx(3, abs=1e-4)
    wrong = {**part, "name": "picture"}
    refused = httpx.post(f"{endpoint}/v2/models/shapes/infer", json={"inputs": [wrong]})
    assert refused.status_code == 400
    assert "image" in refused.json()["error"]


def test_replicas_are_forked_from_a_process_that_has_imported(endpoint: str) -> None:
    replicas = [process for process in named("ray::Serve") if forked(process)]
    assert len(replicas) >= 2, "one of each model"


def test_replicas_log_what_they_compute_in(endpoint: str) -> None:
    logs = (home.home() / "ray" / "session_latest" / "logs" / "serve").glob("replica_*tiny*.log")
    said = "\n".join(path.read_text() for path in logs)
    assert f"computes in {resolve('auto', [this_cpu()])}: " in said
    assert "runner serves with" in said


def test_only_loopback_listens(endpoint: str) -> None:
    port = int(endpoint.rsplit(":", 1)[1])
    listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
    assert listening == {"127.0.0.1"}


def test_requests_are_logged_without_what_they_ask(client: openai.OpenAI) -> None:
    trace = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "x-request-id": "mine-1"}
    answer = client.with_options(default_headers=trace).completions.with_raw_response.create(
        model="tiny", prompt="a secret", max_tokens=3, extra_body={"ignore_eos": True}
    )
    assert answer.headers["x-request-id"] == "mine-1"
    logs = home.home() / "ray" / "session_latest" / "logs" / "serve"

    def written() -> str:
        return "".join(path.read_text() for path in logs.glob("access_tandem_*.jsonl"))

    _until(lambda: '"mine-1"' in written(), 5, "no line of the request")
    (line,) = [json.loads(each) for each in written().splitlines() if '"mine-1"' in each]
    assert {"path": "/v1/completions", "status": 200, "model": "tiny", "generated_tokens": 3}.items() <= line.items()
    assert line["trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["duration_ms"]
    assert "secret" not in written()


def test_a_closed_connection_frees_its_slots(endpoint: str) -> None:
    # 32 texts of 1,000 tokens are many seconds of work; what is left of it must not be done.
    body = {"model": "tiny", "prompt": ["a"] * 32, "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{endpoint}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()  # held: httpx closes the connection with its iterator
        assert "error" not in next(lines)
        _until(lambda: _busy(endpoint)["running"] > 1, 20, "the texts do not run together")
    _until(lambda: _busy(endpoint)["running"] == 0, 5, "the slots are still taken")


def test_more_texts_than_there_are_places_are_answered_and_more_than_there_may_be_refused_by_name(
    client: openai.OpenAI, endpoint: str
) -> None:
    answer = client.completions.create(model="tiny", prompt=["a"] * 64, n=2, max_tokens=8)
    assert len(answer.choices) == 128 > 2 * 16 + 32, "above what replicas hold, and max_queued"
    with pytest.raises(openai.BadRequestError, match="at most 128 texts") as refused:
        client.chat.completions.create(model="tiny", messages=HELLO, n=129)
    assert refused.value.param == "n"
    _until(lambda: _busy(endpoint)["running"] == 0, 10, "something of it goes on")


def test_status_and_chat_in_the_terminal(endpoint: str) -> None:
    status = CliRunner().invoke(cli.app, ["status"])
    assert status.exit_code == 0, status.output
    assert "tiny" in status.output
    assert re.search(r"[12]/[12]", status.output)
    asked = CliRunner().invoke(cli.app, ["chat", "--system", "Be brief.", "--prompt", "hello"])
    assert asked.exit_code == 0, asked.output
    piped = CliRunner().invoke(cli.app, ["chat", "--model", "tiny"], input="hello\n/clear\nagain\n/exit\n")
    assert piped.exit_code == 0, piped.output
    wrong = CliRunner().invoke(cli.app, ["chat", "--model", "shapes", "--prompt", "x"])
    assert isinstance(wrong.exception, UserError)
    assert "tiny" in str(wrong.exception)


def test_load_adds_a_replica_and_quiet_takes_it_away(endpoint: str) -> None:
    stop = threading.Event()
    load = threading.Thread(target=lambda: asyncio.run(_load(endpoint, stop)))
    load.start()
    try:
        _until(lambda: _replicas() == 2, 90, "no second replica")
        _until(lambda: len(_serving(endpoint)) == 2, 60, "the second replica gets no work")
        connect.init_ray()
        ray.kill(ray.get_actor("state:tandem", namespace=succession.NAMESPACE), no_restart=False)
        _until(lambda: _scaling(endpoint).get("changes") == [], 60, "the state actor that came back does not scale")
        assert _scaling(endpoint)["wanted"] == 2, "it goes on from the number that there is"
    finally:
        stop.set()
        load.join()
    # One may just be starting: on a busy machine the load, which is closed, comes in waves.
    _until(lambda: _replicas() == _scaling(endpoint).get("wanted") == 1, 60, "the second replica stays")
    last = _scaling(endpoint)["changes"][-1]
    assert (last["before"], last["after"]) == (2, 1), last
    shown = CliRunner().invoke(cli.app, ["status"]).output
    assert re.search(r"tiny: 1 replica wanted: down: (1 was|0 were) enough", shown), shown


def test_none_while_it_is_quiet_and_the_first_request_waits_for_one(endpoint: str, client: openai.OpenAI) -> None:
    endpoints.up(spec(None, replicas={"min": 0, "max": 2}))
    _until(lambda: _replicas() == 0, 60, "the replica stays")
    _until(lambda: _busy(endpoint)["replicas"] == [], 20, "it is still told of")
    assert httpx.get(f"{endpoint}/health").status_code == 200
    assert CliRunner().invoke(cli.app, ["status"]).exit_code == 0
    text = client.completions.create(model="tiny", prompt="def", max_tokens=5, temperature=0).choices[0].text
    assert text
    assert _scaling(endpoint)["changes"][-1]["kind"] == "wake"


def test_an_alias_that_moved_is_followed(endpoint: str, client: openai.OpenAI, tmp_path: Path) -> None:
    endpoints.up(spec(None))
    # Where the one before was just going to sleep, it still leaves while another one starts.
    _until(lambda: set(_started().values()) == {"RUNNING"}, 60, "one that leaves is still there")
    before = _started()
    endpoints.up(spec(None, downscale_delay_s=3))  # another setting and one model less: nothing restarts
    assert _started() == before
    _until(lambda: [card.id for card in client.models.list().data] == ["tiny"], 10, "shapes is still listed")
    second = registry.register("tiny", tiny_models.language_model(tmp_path, seed=1), run_id=None, alias="champion")
    endpoints.up(spec(None))
    answer = client.completions.with_raw_response.create(model="tiny", prompt="a", max_tokens=1)
    assert answer.headers["x-tandem-model-version"] == str(second.version) == "2"


def test_mistakes_reach_the_user(endpoint: str) -> None:
    with pytest.raises(UserError, match=r"no alias 'champoin'.*champion"):
        endpoints.up(spec(None, model="models:/tiny@champoin"))
    taken = urlsplit(connect.job_client().get_address()).port
    with pytest.raises(UserError, match=f"http.port {taken} on 127.0.0.1 is taken"):
        endpoints.up(spec(None).model_copy(update={"http": HttpSpec(port=taken)}))


def test_the_endpoint_goes_over_to_another_port_and_to_tls(endpoint: str, tmp_path: Path) -> None:
    """No request at the old address fails before the new one is there."""
    certificate, key = certificates.make(tmp_path, "elsewhere.example")
    http = HttpSpec.model_validate({"port": free_port(), "tls": {"certificate": certificate, "key": key}})
    answers: list[int] = []
    there_when_it_went: list[bool] = []

    def ask() -> None:
        context = ssl.create_default_context(cafile=certificate)
        context.check_hostname = False
        with httpx.Client(base_url=endpoint, timeout=60) as asking, httpx.Client(verify=context, timeout=60) as other:
            try:
                while True:
                    answers.append(asking.get("/v1/models").status_code)
            except httpx.TransportError:
                there_when_it_went.append(other.get(f"https://127.0.0.1:{http.port}/v1/models").status_code == 200)

    asking = threading.Thread(target=ask)
    asking.start()
    outcome = endpoints.up(spec(None).model_copy(update={"http": http}), print)
    asking.join(60)
    assert set(answers) == {200}
    assert there_when_it_went == [True]
    assert outcome["endpoint"] == f"https://127.0.0.1:{http.port}"
    status = CliRunner().invoke(cli.app, ["status"])
    assert (status.exit_code, outcome["endpoint"] in status.output) == (0, True), status.output
    asked = CliRunner().invoke(cli.app, ["chat", "--prompt", "hello"])
    assert asked.exit_code == 0, asked.output
    _until(lambda: _refused(endpoint), 20, "the old gateway goes on")


def made(*arguments: str) -> str:
    """Make a key as its owner would, and return it."""
    done = CliRunner().invoke(cli.app, ["keys", "make", *arguments])
    assert done.exit_code == 0, done.output
    return next(word for word in done.output.split() if word.startswith("tandem-"))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_keys_are_asked_for_and_what_they_use_is_counted_to_the_token(endpoint: str) -> None:
    alice, short, gone = made("alice"), made("short", "--tokens-per-day", "60"), made("gone")
    assert CliRunner().invoke(cli.app, ["keys", "revoke", "gone"]).exit_code == 0
    guarded = {"keys": KeysSpec(required="always"), "gateway": GatewaySpec(replicas=2)}
    at = endpoints.up(spec(None).model_copy(update=guarded))["endpoint"]
    with httpx.Client(base_url=at, timeout=60) as http:
        _until(lambda: http.get("/v1/models").status_code == 401, 20, "a gateway without keys is still there")
        wrong = (gone, alice.lower(), alice[:-1], alice + "x", "sk-other", short[: len(short) // 2])
        refusals = {http.get("/v1/models", headers=bearer(key)).text for key in wrong}
        assert len(refusals) == 1, "a refusal tells why"
        for route in routes.build(lambda: None).routes:  # type: ignore[arg-type,return-value]
            path = re.sub("{[^}]*}", "tiny", getattr(route, "path", ""))
            for headers in ({}, {"host": "x/health?"}):
                status = http.request(sorted(route.methods)[0], path, headers=headers).status_code  # type: ignore[attr-defined]
                assert status == (200 if path in OPEN_PATHS else 401), path
        used = [_asked(http, alice, max_tokens) for max_tokens in (3, 17, 40)]
        killed = _gateways()[0]
        os.kill(killed, signal.SIGKILL)
        _until(lambda: killed not in _gateways() and len(_gateways()) == 2, 30, "the killed gateway is not replaced")
    with httpx.Client(base_url=at, timeout=60) as http:
        used += [_asked(http, alice, max_tokens) for max_tokens in (5, 7)]
        cut = http.post("/v1/completions", headers=bearer(short), json={**LONG, "stream": True}).text
        assert '"code":"insufficient_quota"' in cut.replace(" ", "")
        assert http.post("/v1/completions", headers=bearer(short), json=LONG).status_code == 429
    _until(lambda: _used("alice") == [("tiny", 5, sum(used))], 10, "what was used is not what was counted")
    everything = [path for path in home.home().rglob("*") if path.is_file() and path.stat().st_size < 50_000_000]
    secret = alice.split("-", 2)[2].encode()  # which may hold more of these
    assert [path for path in everything if secret in path.read_bytes()] == []


def _gateways() -> list[int]:
    replicas = endpoints._details()["applications"]["tandem"]["deployments"]["gateway"]["replicas"]
    return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING"]


def _asked(http: httpx.Client, key: str, max_tokens: int) -> int:
    body = {"model": "tiny", "prompt": "a b c", "max_tokens": max_tokens, "ignore_eos": True}
    return int(http.post("/v1/completions", headers=bearer(key), json=body).json()["usage"]["total_tokens"])


def _used(key: str) -> list[tuple[str, int, int]]:
    rows = json.loads(CliRunner().invoke(cli.app, ["usage", "--key", key, "--json"]).output)
    return [(row["model"], row["requests"], row["prompt_tokens"] + row["generated_tokens"]) for row in rows]


def test_down_leaves_nothing(endpoint: str) -> None:
    done = CliRunner().invoke(cli.app, ["down"])
    assert "stopped tandem, tandem.tiny" in done.output
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{endpoint}/health")
    assert endpoints.status() is None
    assert "nothing is served" in CliRunner().invoke(cli.app, ["status"]).output
    assert "nothing was served" in CliRunner().invoke(cli.app, ["down"]).output
    assert named("ray::Serve", "ray::ActorInRay", "ray::RatesActor") == []


async def _load(endpoint: str, stop: threading.Event) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=endpoint, timeout=120, limits=limits) as client:
        await asyncio.gather(*(_keep_streaming(client, stop) for _ in range(STREAMS)))


async def _keep_streaming(client: httpx.AsyncClient, stop: threading.Event) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    while not stop.is_set():
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line async for line in answer.aiter_lines()]
            if answer.status_code == 429:  # a slow machine: what waits is more than a minute's work
                await asyncio.sleep(1)
                continue
            assert answer.status_code == 200, lines
            assert "data: [DONE]" in lines, lines[-3:]


def _refused(endpoint: str) -> bool:
    try:
        httpx.get(f"{endpoint}/health")
    except httpx.ConnectError:
        return True
    return False


def _busy(endpoint: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{endpoint}/status", timeout=30).json()["tiny"]
    return found


def _scaling(endpoint: str) -> dict[str, Any]:
    """Return what is told of scaling; nothing while nobody decides."""
    found: dict[str, Any] = _busy(endpoint).get("scaling", {})
    return found


def _serving(endpoint: str) -> set[str]:
    return {replica["replica_id"] for replica in _busy(endpoint)["replicas"] if replica["running"]}


def _started() -> dict[str, str]:
    """Return by replica what Serve says of it, also of one that leaves."""
    details = ray_serve_internals.serve_details(connect.job_client().get_address())
    (engine,) = details["applications"][model_app("tandem", "tiny")]["deployments"].values()
    return {replica["replica_id"]: str(replica["state"]) for replica in engine["replicas"]}


def _replicas() -> int:
    status = endpoints.status()
    assert status is not None
    running: int = status["models"]["tiny"]["replicas"]["running"]
    return running


def _until(condition: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)
