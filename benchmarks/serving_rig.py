"""What benchmarks/serving.py stands on: models to serve, a cluster of its own, load, memory, and verdicts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
VOCABULARY = 8192
INSTANT = '''
"""An engine that answers at once: what is measured in front of it is everything else."""

from serve.engines.protocol import Delta, EngineLoad
from serve.engines.table import EngineEntry


class Instant:
    max_context = 1_000_000

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    async def start(self): ...

    async def stop(self): ...

    async def check(self, request): ...

    async def generate(self, request):
        most = request.params.max_tokens
        for number in range(1, most + 1):
            reason = "length" if number == most else None
            yield Delta("x", (1,), reason, len(request.prompt_token_ids), number)

    def load(self):
        return EngineLoad(0, 0, 0, 1, 0.0)

    def report(self):
        return {"name": "instant"}

    def healthy(self):
        return True


def load(setup):
    from transformers import AutoTokenizer

    from serve.engines.replica import GenerativeReplica

    return GenerativeReplica(Instant(AutoTokenizer.from_pretrained(setup.directory)), setup.identity, {})


ENGINE = EngineEntry(name="instant", serves=frozenset({"generative"}), load="instant_engine:load")
'''


@dataclass
class Verdicts:
    """What was measured beside its bar."""

    lines: list[str] = field(default_factory=list)
    failed: int = 0

    def judge(self, name: str, value: float, bar: str, unit: str = "", note: str = "") -> None:
        """Print a value beside its bar, which is written as `>= 0.9` or `<= 10`."""
        relation, number = bar.split()
        passed = value >= float(number) if relation == ">=" else value <= float(number)
        self.failed += not passed
        self.say(f"{name:<58} {value:9.3f} {unit:<3} bar {bar:<9} {'ok' if passed else 'MISSED'}  {note}")

    def say(self, line: str) -> None:
        """Print a line, and keep it for the end."""
        self.lines.append(line)
        print(line, flush=True)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_models(folder: Path) -> None:
    """Write the 14M Llama of benchmarks/engine.py as `llama`, and a tiny one with a chat template as `tiny`."""
    import engine

    from tests.support import tiny_models

    tiny_models.export(folder / "llama", engine.tokenizer(), engine.random_model("14M"))
    tiny_models.language_model(folder / "tiny")
    (folder / "spec").mkdir()  # what is sent with an engine of one's own is this folder
    (folder / "spec" / "instant_engine.py").write_text(INSTANT, encoding="utf-8")


class Rig:
    """A cluster in a home of its own, and the endpoint on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.endpoint = ""
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "TANDEM_HOME": str(folder / "h")}
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            self._environment.pop(name, None)

    def tandem(self, *arguments: str, timeout_s: float = 240) -> str:
        """Run `tandem` as a user does, and return what it prints. Raises RuntimeError with its words."""
        command = [sys.executable, str(ROOT / "tandem.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment, timeout=timeout_s)
        if done.returncode:
            raise RuntimeError(f"tandem {' '.join(arguments)}: {done.stderr[-2000:]}")
        return done.stdout

    def up(self, spec: dict[str, Any]) -> str:
        """Serve a spec, or change what is served to it; returns the address."""
        path = self.folder / "spec" / "serve.yaml"
        spec = {"drain_s": 20, "start_timeout_s": 120, **spec}
        spec["http"] = {"port": free_port() if not self.endpoint else int(self.endpoint.rsplit(":", 1)[1])}
        path.write_text(yaml.safe_dump(spec), encoding="utf-8")
        self.endpoint = json.loads(self.tandem("serve", "up", str(path), "--json"))["endpoint"]
        return self.endpoint

    def down(self) -> None:
        """Stop the endpoint."""
        self.tandem("serve", "down")
        self.endpoint = ""

    def key(self, name: str, *options: str) -> str:
        """Make a key."""
        return self.tandem("serve", "keys", "make", name, *options).split()[0]

    def processes(self, name: str) -> list[psutil.Process]:
        """List the processes of this cluster whose names begin so."""
        from cluster import local, processes

        with self.at_home():
            state = local.state()
        assert state is not None
        found = []
        for process in processes.members(state.id, state.sessions, state.started_at):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name().startswith(name):
                    found.append(process)
        return found

    def replicas(self, model: str) -> list[psutil.Process]:
        """List the processes of a model's replicas."""
        return self.processes(f"ray::ServeReplica:tandem.{model}:")

    def gateways(self) -> list[psutil.Process]:
        """List the processes of the gateway's replicas."""
        return self.processes("ray::ServeReplica:tandem:")

    def kill(self, process: psutil.Process) -> None:
        """SIGKILL a process of this cluster."""
        process.send_signal(signal.SIGKILL)

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Look at this cluster from this process."""
        before = os.environ.get("TANDEM_HOME")
        os.environ["TANDEM_HOME"] = self._environment["TANDEM_HOME"]
        try:
            yield
        finally:
            os.environ.pop("TANDEM_HOME")
            if before is not None:
                os.environ["TANDEM_HOME"] = before


@contextmanager
def rig(cpus: int) -> Iterator[Rig]:
    """Start a cluster with so many logical CPUs; nothing of it is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="ts-", dir="/tmp"))  # short: Ray's sockets lie in it
    try:
        write_models(folder)
        own = Rig(folder)
        ports = [f"--{name}-port={free_port()}" for name in ("ray", "dashboard", "mlflow")]
        try:
            own.tandem("cluster", "up", f"--cpus={cpus}", *ports)
            yield own
        finally:
            own.tandem("cluster", "down")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load(url: str, keys: dict[str, tuple[str, float]] | None = None, **given: Any) -> dict[str, Any]:
    """Send load as `tandem serve bench` does and return its figures; `keys` are (key, share) by name."""
    from serve.bench import lengths, report, settings

    callers = tuple(settings.Caller(name, *key) for name, key in (keys or {}).items())
    made = {"prompt_tokens": 16, "answer_tokens": 64, "users": None, "rate": None, "model": "", "warmup": 2, **given}
    for name in ("prompt_tokens", "answer_tokens"):
        made[name] = lengths.parse(str(made[name]), name)
    route = "completions" if made.get("token_ids") else "chat"
    checked = settings.check(
        settings.Settings(
            target=settings.target(url, allow_remote=False),
            **{"callers": callers or (settings.Caller("anyone", None),), "route": route, "drain_s": 20.0, **made},
        )
    )
    return report.run(checked, quiet=True).told


def failures(told: dict[str, Any]) -> int:
    """Count what was neither answered nor rejected with 429, streams that were cut included."""
    counted = told["requests"]
    return int(counted["sent"] - counted["completed"] - counted["rejected_429"])


def said(told: dict[str, Any]) -> str:
    """Return in a few words what failed."""
    counted = told["requests"]
    return ", ".join(f"{kind}: {words}" for kind, words in counted["said"].items() if kind != "429")


@contextmanager
def memory(
    groups: Callable[[], dict[str, list[psutil.Process]]], every_s: float = 2.0
) -> Iterator[dict[str, list[float]]]:
    """Sample the resident memory in MiB of named groups of processes while the block runs."""
    samples: dict[str, list[float]] = {}
    known, over = groups(), threading.Event()

    def sample() -> None:
        while not over.is_set():
            for name, processes in known.items():
                with contextlib.suppress(psutil.NoSuchProcess):
                    samples.setdefault(name, []).append(sum(p.memory_info().rss for p in processes) / 2**20)
            over.wait(every_s)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def wait_until(condition: Callable[[], Any], timeout_s: float, pause_s: float = 0.05) -> float | None:
    """Wait for a condition; returns the seconds it took, None when it did not come."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            return None
        time.sleep(pause_s)
    return time.monotonic() - began


def get(url: str, key: str | None = None) -> Any:
    """Return the JSON at an address, None where nothing answers."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        return httpx.get(url, headers=headers, timeout=5, trust_env=False).json()
    except (httpx.HTTPError, ValueError):
        return None
