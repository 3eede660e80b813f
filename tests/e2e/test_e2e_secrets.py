"""Secrets and prompts through a real endpoint, in requests that succeed, are refused and fail: nothing of them is kept.

The battery's X10: keys, the password of their database, a token in the environment, prompts and sessions are looked for
in every file of Tandem's home (Ray's session and its logs, the access log, MLflow), in the database's own files, in the
command lines of all processes, in what Ray's dashboard tells, and in answers to others.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from cluster import connect, home
from cluster.connect import Connection
from serve import cli, endpoints
from serve.spec import ServeSpec
from tests.support import canaries, postgres, quoting_engine, tiny_models
from tests.support.canaries import PROMPT, SESSION, WRONG_KEY

SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [f"{PROMPT} schema"]}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {f"{PROMPT}-tool": {}}}}}
BROKEN = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"pattern": f"({PROMPT}"}}}
CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"
INFER = "/v2/models/quoting/infer"


def said(role: str = "user", **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 8, "messages": [{"role": role, "content": f"{PROMPT} chat"}], **more}


def written(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 8, "prompt": f"{PROMPT} text", **more}


def tensor(text: str, **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [f"{PROMPT} {text}"], **more}]}


ASKED: list[tuple[int, str, Any]] = [
    (200, CHAT, said(user=PROMPT, metadata={"a": PROMPT}, stop=[PROMPT])),
    (200, CHAT, said(response_format=SCHEMA, max_tokens=100, stream=True)),
    (200, COMPLETIONS, written(logprobs=2, echo=True, prompt_cache_key=SESSION)),
    (200, COMPLETIONS, written(stream=True, n=2)),
    (200, RESPONSES, {"model": "tiny", "input": f"{PROMPT} input", "max_output_tokens": 8, "metadata": {"a": PROMPT}}),
    (200, EMBEDDINGS, {"model": "tiny", "input": [f"{PROMPT} embedded"]}),
    (400, CHAT, said(PROMPT)),
    (400, CHAT, said(tools=[TOOL])),
    (400, CHAT, said(response_format=BROKEN)),
    (400, CHAT, said(temperature=PROMPT, chat_template_kwargs={PROMPT: PROMPT})),
    (400, CHAT, said(**{PROMPT: PROMPT})),
    (400, COMPLETIONS, written(prompt=f"{PROMPT} long " * 2000)),
    (400, COMPLETIONS, written(prompt={PROMPT: PROMPT})),
    (400, COMPLETIONS, written(suffix=PROMPT)),
    (400, RESPONSES, {"model": "tiny", "input": [{"type": PROMPT}], "previous_response_id": PROMPT}),
    (400, EMBEDDINGS, {"model": "tiny", "input": {PROMPT: PROMPT}}),
    (400, COMPLETIONS, f'{{"model": "tiny", "prompt": "{PROMPT}", "prompt": NaN'.encode()),
    (400, COMPLETIONS, f'{{"model": "tiny", "prompt": "{PROMPT} \xff"'.encode("latin-1")),
    (404, COMPLETIONS, written(model=PROMPT)),
    (404, f"/v1/{PROMPT}?prompt={PROMPT}", written()),
    (413, COMPLETIONS, f"{PROMPT} large ".encode() * 500_000),
    (400, INFER, tensor("mistake")),
    (400, INFER, tensor("shape", shape=[2])),
    (500, INFER, tensor("engine")),
    (500, INFER, tensor("failure")),
]
"""What is asked with a valid key: the status, the path and the body."""


@dataclass
class Site:
    """The endpoint, its keys, and what it answered to whom."""

    url: str
    keys: dict[str, str]
    database: Path
    answers: list[str] = field(default_factory=list)
    """Heads of all answers, and bodies of those to callers who had sent no prompt."""

    def ask(self, path: str, body: Any, key: str = "alice", **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"authorization": f"Bearer {self.keys.get(key, key)}", "x-session-id": SESSION, **headers}
        answer = httpx.post(f"{self.url}{path}", content=content, headers=sent, timeout=60)
        self.answers.append(repr(answer.headers))
        return answer

    def read(self, path: str, key: str) -> None:
        """Keep what somebody else is told."""
        answer = httpx.get(f"{self.url}{path}", headers={"authorization": f"Bearer {self.keys[key]}"}, timeout=30)
        assert answer.status_code == 200, path
        self.answers.append(answer.text)


@pytest.fixture(scope="module")
def site(cluster: Connection, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if lacking := postgres.missing():
        pytest.skip(lacking)
    folder = tmp_path_factory.mktemp("canaries")
    quoting_engine.write(folder)
    tiny = {"model": str(tiny_models.language_model(folder / "tiny", context=1024))}
    own = {"model": str(tiny_models.image_classifier(folder / "own")), "engine": "quoting_engine:ENGINE"}
    models = {
        name: {**model, "resources": {"cpus_per_replica": 0.5}} for name, model in (("tiny", tiny), ("quoting", own))
    }
    with postgres.server(canaries.DATABASE) as url:
        keys = {
            name: made(name, "--store", url, *limits)
            for name, limits in (("alice", ()), ("rare", ("--requests-per-minute", "1")), ("operator", ("--operator",)))
        }
        spec = ServeSpec.model_validate(
            {"models": models, "keys": {"required": "always", "store": url}, "drain_s": 10, "start_timeout_s": 180}
        )
        at = endpoints.up(spec, print, folder / "serve.yaml")["endpoint"]
        try:
            yield Site(at, keys, Path(url.split("host=")[1]))
        finally:
            endpoints.down(print)


def made(*arguments: str) -> str:
    done = CliRunner().invoke(cli.app, ["keys", "make", *arguments])
    assert done.exit_code == 0, done.output
    return next(word for word in done.output.split() if word.startswith("tandem-"))


@pytest.fixture(scope="module")
def asked(site: Site) -> Site:
    """The endpoint when everything has been asked."""
    for status, path, body in ASKED:
        answer = site.ask(path, body)
        assert answer.status_code == status, (path, str(body)[:200], answer.text[:500])
    for key, headers in (
        (WRONG_KEY, {}),
        ("alice", {"authorization": f"Basic {WRONG_KEY}"}),
        ("alice", {"authorization": "", "cookie": WRONG_KEY}),
    ):
        refused = site.ask(f"{CHAT}?key={WRONG_KEY}", said(), key, **headers)
        assert refused.status_code == 401
        site.answers.append(refused.text)
    assert [site.ask(CHAT, said(), "rare").status_code for _ in range(2)] == [200, 429]
    late = site.ask(COMPLETIONS, written(max_tokens=900, ignore_eos=True), **{"x-tandem-timeout-s": "0.05"})
    assert late.status_code == 408
    _no_http(site.url)
    _killed_in_the_middle(site)
    for path, key in (("/metrics", "operator"), ("/status", "operator"), ("/v1/models", "rare"), ("/health", "rare")):
        site.read(path, key)
    return site


def _no_http(url: str) -> None:
    with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=10) as opened:
        opened.sendall(f"{PROMPT} {WRONG_KEY}\r\n\r\n".encode())
        assert b" 400 " in opened.recv(1000)


def _killed_in_the_middle(site: Site) -> None:
    """Kill the replica under a stream, which another one then ends."""
    body = written(max_tokens=900, ignore_eos=True, stream=True)
    head = {"authorization": f"Bearer {site.keys['alice']}", "x-session-id": SESSION}
    with httpx.stream("POST", f"{site.url}{COMPLETIONS}", json=body, headers=head, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        (replica,) = endpoints._details()["applications"]["tandem.tiny"]["deployments"]["engine"]["replicas"]
        os.kill(replica["pid"], signal.SIGKILL)
        assert "data: [DONE]" in list(lines)


def secrets(site: Site) -> tuple[str, ...]:
    """Return what must be nowhere: of each key the part that only its owner has."""
    return (*canaries.ALL, *(key.split("-", 2)[2] for key in site.keys.values()))


def test_no_file_has_any_of_them(asked: Site) -> None:
    assert canaries.holders(home.home(), secrets(asked)) == []
    assert canaries.holders(asked.database, secrets(asked)) == []


def test_failures_are_logged_all_the_same(asked: Site) -> None:
    for reason in ("RuntimeError: there is no answer to …", "KeyError: '…", "the engine cannot read '…"):
        assert any("/logs/serve/replica_" in place for place in canaries.holders(home.home(), (reason,)))


def test_no_command_line_and_no_view_of_the_cluster_has_any_of_them(asked: Site) -> None:
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    views = [
        json.dumps(connect.get_json(path))
        for path in ("/api/serve/applications/", "/api/jobs/", "/api/v0/actors?detail=1", "/api/v0/workers?detail=1")
    ]
    shown = CliRunner().invoke(cli.app, ["status", "--json"]).output
    told = [*lines, *views, shown, CliRunner().invoke(cli.app, ["keys", "list", "--json"]).output]
    assert [(secret, text[:200]) for secret in secrets(asked) for text in told if secret in text] == []


def test_nobody_is_told_any_of_them_who_has_not_sent_it(asked: Site) -> None:
    assert [(secret, text[:200]) for secret in secrets(asked) for text in asked.answers if secret in text] == []
