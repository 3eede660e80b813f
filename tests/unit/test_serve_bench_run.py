"""The load generator against a real gateway on a socket, and against a server that fails in every way."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from serve import cli, endpoints
from serve.front import tls as front_tls
from tests.support import bench_servers, certificates, tiny_models

SHORT = ["--prompt-tokens", "12", "--answer-tokens", "3", "--seconds", "30", "--warmup", "1"]
LONGER = ["--prompt-tokens", "120"]
MODELS = b'{"data": [{"id": "m"}]}'


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tiny_models.language_model(tmp_path_factory.mktemp("tiny"), context=256)
    with bench_servers.gateway(directory) as address:
        yield address


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run `tandem serve bench` and return the JSON that it wrote."""

    def run(url: str, *options: str) -> dict[str, Any]:
        done = invoke(tmp_path, url, *options)
        assert done.exit_code == 0, done.output
        told: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
        return told

    return run


def invoke(folder: Path, url: str, *options: str) -> Result:
    return CliRunner().invoke(cli.app, ["bench", "--url", url, "--out", str(folder / "out"), "--no-plot", *options])


def test_the_closed_loop_gets_whole_answers_of_the_wished_lengths(url: str, bench: Any) -> None:
    told = bench(url, *SHORT, *LONGER, "--users", "3", "--requests", "9", "--each-request", "--slo", "ttft=60s,e2e=60s")
    assert told["requests"]["sent"] == told["requests"]["completed"] == 9 == told["slo"]["met"]
    assert told["rates"]["completion_tokens"] == 27
    each = told["each_request"]
    assert [one["number"] for one in each] == list(range(9))  # the warm-up is not among them
    assert {one["completion_tokens"] for one in each} == {3}
    assert sum(one["prompt_tokens"] for one in each) / 9 == pytest.approx(120, rel=0.2)
    assert all(one["intended"] <= one["sent"] <= one["first"] <= one["last"] <= one["ended"] for one in each)
    assert told["settings"]["model"] == "tiny" == told["server"]["card"]["id"]
    assert told["warm_up"]["requests"] == 1
    assert len(told["client"]["cpu_share"]) == 1
    assert 0 < told["client"]["cpu_share"][0] < 1


def test_the_open_loop_sends_at_the_arrivals_and_counts_from_them(url: str, bench: Any) -> None:
    options = ("--rate", "50", "--burstiness", "inf", "--requests", "8", "--max-open", "1")
    told = bench(url, *SHORT, *options, "--each-request", "--route", "completions", "--token-ids", "20:200")
    each = told["each_request"]
    assert [one["intended"] for one in each] == pytest.approx([0.02 * at for at in range(1, 9)])
    assert {one["prompt_tokens"] for one in each} == {12}
    assert told["requests"]["completed"] == 8
    assert told["latency_ms"]["queue"]["max"] == pytest.approx(
        max(1e3 * (o["sent"] - o["intended"]) for o in each), 0.01
    )


def test_several_processes_share_one_run(url: str, bench: Any) -> None:
    told = bench(url, *SHORT, "--users", "2", "--requests", "5", "--processes", "2", "--each-request", "--no-stream")
    assert [one["number"] for one in told["each_request"]] == list(range(5))
    assert told["requests"]["completed"] == 5
    assert told["client"]["processes"] == 2
    assert "ttft" not in told["latency_ms"]


def test_keys_are_told_apart(url: str, bench: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("big tandem-a 3\nsmall tandem-b\n")
    told = bench(url, *SHORT, "--users", "4", "--requests", "8", "--keys-file", str(keys))
    assert set(told["callers"]) == {"big", "small"}
    assert sum(own["requests"]["completed"] for own in told["callers"].values()) == 8
    assert 0.5 <= told["fairness"]["jain_of_tokens"] <= 1
    assert "tandem-a" not in (tmp_path / "out.json").read_text()


def test_what_it_prints(url: str, tmp_path: Path) -> None:
    said = invoke(tmp_path, url, *SHORT, "--requests", "2", "--model", "tiny", "--plot").output
    assert "2 of 2 requests completed" in said
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")
    assert "failed: none" in said
    assert "warm-up: 1 requests, 0 of them not whole; they are in no figure" in said
    assert re.search(r"ttft +2 ", said)
    assert re.search(r"prompts are words of \d+\.\d\d tokens, and \d+ tokens beside them", said)


def answer(body: bytes, status: str = "200 OK", *headers: str, kind: str = "application/json") -> bytes:
    lines = (f"HTTP/1.1 {status}", f"content-type: {kind}", f"content-length: {len(body)}", *headers, "", "")
    return "\r\n".join(lines).encode() + body


def chunked(*pieces: bytes, ends: bool = True) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + (b"0\r\n\r\n" if ends else b"")


TEXT = b'data: {"choices": [{"text": "x"}]}\n\n'
DONE = b"data: [DONE]\n\n"
ANSWERS = {
    "ok": chunked(TEXT, b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}\n\n', DONE),
    "cut": chunked(TEXT, ends=False),
    "short": chunked(TEXT),
    "error": chunked(TEXT, b'data: {"error": {"message": "lost"}}\n\n'),
    "busy": answer(b'{"error": {"message": "later"}}', "429 Too Many Requests", "retry-after: 0"),
    "fails": answer(b"oh", "500 Internal Server Error", kind="text/plain"),
    "closed": None,
    "nonsense": b"SSH-2.0-x\r\n\r\n",
}


def test_the_endpoint_from_here_is_reached_by_its_own_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, key = certificates.make(tmp_path, "some.other.name")

    def write(request: str) -> bytes:
        body = MODELS if request.startswith("/v1/models") else b'{"usage": {"completion_tokens": 1}}'
        return answer(body, "200 OK", "connection: close")

    with bench_servers.scripted(write, front_tls.context(own, key)) as url:
        monkeypatch.setattr(endpoints, "reached", lambda: (url, own))  # what `serve up` has written
        options = ["--requests", "2", "--users", "1", "--no-stream", "--no-plot", "--out", str(tmp_path / "out")]
        done = CliRunner().invoke(cli.app, ["bench", *options])
        assert done.exit_code == 0, done.output
        assert json.loads((tmp_path / "out.json").read_text())["requests"]["completed"] == 2
        other = invoke(tmp_path, url, "--requests", "2", "--no-stream")
        assert other.exit_code != 0
        assert "does not answer" in str(other.exception or other.output)


def test_each_way_to_fail_is_counted_apart(bench: Any, tmp_path: Path) -> None:
    """What is no cut stream at all is there beside what is; none of them ends the run."""

    def write(request: str) -> bytes | None:
        if request.startswith("/v1/models"):
            return answer(MODELS)
        return next(raw for name, raw in ANSWERS.items() if f'"{name}"' in request)

    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": name}) for name in ANSWERS))
    with bench_servers.scripted(write) as url:
        told = bench(
            url, "--route", "completions", "--file", str(rows), "--requests", "8", "--users", "1", "--warmup", "0"
        )
    counted = told["requests"]
    assert (counted["sent"], counted["completed"], counted["rejected_429"], counted["cut_streams"]) == (8, 1, 1, 3)
    assert counted["failed_otherwise"] == {"connection": 1, "error in the stream": 1, "http 500": 1}
    assert counted["said"]["http 500"] == "oh"
    assert counted["said"]["429"] == "later"
    assert counted["said"]["error in the stream"] == "lost"


def test_an_answer_shorter_than_its_length_is_cut(bench: Any) -> None:
    def write(request: str) -> bytes | None:
        return answer(MODELS) if request.startswith("/v1/models") else b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n"

    with bench_servers.scripted(write) as url:
        options = ("--requests", "2", "--users", "1", "--warmup", "0", "--token-ids", "1:9", "--route", "completions")
        told = bench(url, *options)
    assert told["requests"]["cut_streams"] == 2


def test_what_cannot_be_loaded_is_refused(url: str, tmp_path: Path) -> None:
    for address, options, said in (
        ("http://192.0.2.1:8000", (), "is not this machine"),
        ("http://127.0.0.1:1", (), "does not answer"),
        ("https://127.0.0.1:1", ("--cacert", __file__), "--cacert: "),
        (url, ("--model", "other"), "has no model 'other' for this key; there are: tiny"),
        (
            url,
            ("--answer-tokens", "9999", "--prompt-tokens", "400", "--warmup", "1"),
            "no request of the warm-up succeeded",
        ),
    ):
        done = invoke(tmp_path, address, *options)
        assert getattr(done.exception, "exit_code", None) == 2, done.output
        assert said in str(done.exception)
    assert not (tmp_path / "out.json").exists()


def test_what_is_not_answered_in_time_is_told(bench: Any) -> None:
    """A time-out of one request, and what still runs when the time of all is over."""

    def write(request: str) -> bytes | None:
        if not request.startswith("/v1/models"):
            time.sleep(0.5)  # the server's only thread, too
        return answer(MODELS) if request.startswith("/v1/models") else ANSWERS["ok"]

    options = ("--route", "completions", "--token-ids", "1:9", "--warmup", "0", "--requests", "1", "--users", "1")
    with bench_servers.scripted(write) as url:
        late = bench(url, *options, "--timeout", "0.1")
        unfinished = bench(url, *options, "--seconds", "0.1", "--drain", "0")
        never = bench(
            url,
            "--rate",
            "100",
            *options[:-4],
            "--requests",
            "3",
            "--max-open",
            "1",
            "--seconds",
            "0.1",
            "--drain",
            "0",
        )
    assert late["requests"]["failed_otherwise"] == {"time-out": 1}
    assert unfinished["requests"]["unfinished"] == 1
    assert never["requests"]["unfinished"] == 3
    assert "never sent" in never["requests"]["said"]["unfinished"]
