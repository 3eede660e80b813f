"""Another version of Tandem is deployed over one that serves, and its reports have another shape: no request fails, all
limits hold, and what the endpoint's actors know goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import ray
from typer.testing import CliRunner

from cluster import connect, home
from cluster.connect import Connection
from serve import cli, endpoints
from serve.deploy import succession
from tests.support import tiny_models

ROOT = Path(__file__).parents[2]
RATE, CONCURRENCY = 6, 2
LONG = 1200
"""Tokens of a stream that is watched: half of it takes about a second, and what is sent is not read so late."""
CHANGES = {
    "serve/wire.py": ("    cache_tokens_total: int = 0\n", "    cache_tokens_total: int = 0\n    newer: int = 0\n"),
}
"""Where the newer version's reports differ: in a field more."""


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """Another version of Tandem's code."""
    for package in connect.PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / "newer" / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tandem.py", tmp_path / "newer")
    for name, (old, new) in CHANGES.items():
        path = tmp_path / "newer" / name
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
    return tmp_path / "newer"


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    model = tiny_models.language_model(tmp_path / "tiny", context=LONG + 80)
    tiny = {"model": str(model), "resources": {"cpus_per_replica": 0.5}, "replicas": {"min": 1, "max": 2}}
    gateway = {"replicas": 2}
    path = tmp_path / "serve.yaml"
    path.write_text(json.dumps({"models": {"tiny": tiny}, "gateway": gateway, "keys": {"required": "always"}}))
    return path


@pytest.fixture
def up(cluster: Connection, spec: Path) -> Iterator[Callable[[Path], str]]:
    """Deploy with the code of a folder, as its own command; returns what that said."""

    def command(code: Path) -> str:
        environment = {**os.environ, "PYTHONPATH": str(code)}
        arguments = [sys.executable, "tandem.py", "serve", "up", str(spec)]
        done = subprocess.run(arguments, cwd=code, env=environment, capture_output=True, text=True, timeout=180)
        print(done.stdout, done.stderr)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    yield command
    endpoints.down(print)


class Clients:
    """Ask all the while: one key without limits, one with a rate, one with a concurrency."""

    def __init__(self, endpoint: str, keys: dict[str, str]) -> None:
        self._endpoint, self._keys = endpoint, keys
        self.statuses: dict[str, Counter[str]] = {name: Counter() for name in keys}
        self._opened: Counter[str] = Counter()
        self.most_open: Counter[str] = Counter()
        """Streams that each key has had open at the same time."""
        self._lock, self._ended = threading.Lock(), threading.Event()
        self.began = time.monotonic()
        users = ["free", "free", "rated", *["narrow"] * (CONCURRENCY + 2)]
        self._threads = [threading.Thread(target=self._ask, args=(name,), daemon=True) for name in users]
        for thread in self._threads:
            thread.start()

    def end(self) -> float:
        """Stop; returns how long they have asked."""
        self._ended.set()
        for thread in self._threads:
            thread.join(60)
        return time.monotonic() - self.began

    def _ask(self, name: str) -> None:
        while not self._ended.wait(0.1):
            try:
                told = self._stream(name)
            except httpx.HTTPError as error:
                told = repr(error)
            with self._lock:
                self.statuses[name][told] += 1

    def _stream(self, name: str) -> str:
        tokens = LONG if name == "narrow" else 4
        body = {"model": "tiny", "prompt": "a", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"continuous_usage_stats": True}
        headers = {"authorization": f"Bearer {self._keys[name]}"}
        with httpx.stream("POST", f"{self._endpoint}/v1/completions", json=body, headers=headers, timeout=90) as answer:
            if answer.status_code != 200:
                return f"{answer.status_code} {json.loads(answer.read())['error']['code']}"
            lines = (line for line in answer.iter_lines() if line)
            with self._open(name):  # for its first half: what comes is read later than it was sent
                middle = next((line for line in lines if told_tokens(line) >= tokens / 2), "nothing")
            last = [middle, *lines][-1]
        return "whole" if last == "data: [DONE]" else f"cut after {last}"

    @contextmanager
    def _open(self, name: str) -> Iterator[None]:
        with self._lock:
            self._opened[name] += 1
            self.most_open[name] = max(self.most_open[name], self._opened[name])
        try:
            yield
        finally:
            with self._lock:
                self._opened[name] -= 1


def told_tokens(line: str) -> int:
    """Return how many tokens a stream has had, as its event tells; its end and its errors count as all."""
    event = {} if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))
    return int(event["usage"]["completion_tokens"]) if "usage" in event else 10**9


def said_by_gateways(word: str) -> list[str]:
    """Return the lines of the gateways' logs that have a word."""
    logs = home.home() / "ray" / "session_latest" / "logs" / "serve"
    lines = (line for path in logs.glob("*gateway*.log") for line in path.read_text().splitlines())
    return [line for line in lines if word in line]


def generations() -> dict[str, succession.Generation]:
    """Return what runs of the endpoint's actors, by name."""
    connect.init_ray()
    names = [*succession.names("state:tandem"), *succession.names("rates:tandem")]
    found = {name: actor for name in names if (actor := succession.named(name)) is not None}
    return {name: ray.get(actor.generation.remote(), timeout=10) for name, actor in found.items()}


def made(*arguments: str) -> str:
    done = CliRunner().invoke(cli.app, ["keys", "make", *arguments])
    assert done.exit_code == 0, done.output
    return next(word for word in done.output.split() if word.startswith("tandem-"))


@pytest.mark.alone  # a gateway that has waited a second for the rates counts alone, and lets more through
def test_a_newer_version_takes_over_while_requests_run(up: Callable[[Path], str], newer: Path) -> None:
    keys = {
        "free": made("free"),
        "rated": made("rated", "--requests-per-minute", str(RATE)),
        "narrow": made("narrow", "--concurrency", str(CONCURRENCY)),
    }
    up(ROOT)
    before = generations()
    assert set(before) == {"state:tandem", "rates:tandem"}
    clients = Clients(endpoints.endpoint(), keys)
    said = up(newer)
    assert said.count("ran other code of Tandem: replaced, with what it knew") == 2, said
    took_s = clients.end()
    after = generations()
    assert set(after) == {"state:tandem#2", "rates:tandem#2"}
    assert {each.version for each in after.values()}.isdisjoint(each.version for each in before.values())
    print(*said_by_gateways("alone"), sep="\n")
    print(f"{took_s:.0f} s: {clients.statuses}, open at once {clients.most_open}")
    assert set(clients.statuses["free"]) == {"whole"}
    assert clients.statuses["free"]["whole"] > 20
    assert set(clients.statuses["rated"]) == {"whole", "429 rate_limit_exceeded"}
    assert clients.statuses["rated"]["whole"] <= RATE + RATE * took_s / 60 + 1
    assert set(clients.statuses["narrow"]) == {"whole", "429 rate_limit_exceeded"}
    assert clients.most_open["narrow"] == CONCURRENCY < 4, "four ask"
