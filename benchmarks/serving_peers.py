"""Those beside whom the gateway is measured: the bare engine, Ray Serve's bare echo, litellm's proxy."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from serving_rig import ROOT, free_port, get, wait_until

ECHO_ANSWER = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}],
               "usage": {"prompt_tokens": 1, "completion_tokens": 1}}  # fmt: skip
MASTER_KEY = "sk-benchmark-of-this-machine"


class BareEngine:
    """The engine in a process of its own, without anything in front of it; it measures when it is told to."""

    def __init__(self, directory: Path, threads: int) -> None:
        command = [sys.executable, __file__, "engine", str(directory), str(threads)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self._ask("")

    def rate(self, streams: int, prompt: int, new: int) -> float:
        """Return tokens/s of so many streams that begin together."""
        return float(self._ask(f"rate {streams} {prompt} {new}"))

    def ttft(self, requests: int, prompt: int) -> float:
        """Return the median of the seconds to the first token, one stream after the other."""
        return float(self._ask(f"ttft {requests} {prompt} 4"))

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        while answer := self._process.stdout.readline():
            if answer.startswith("@ "):
                return answer[2:].strip()
        raise RuntimeError("the bare engine died")


async def engine_child(directory: str, threads: int) -> None:
    """Be the bare engine: one line on stdin is one measurement."""
    from serve.engines.torch.torch_engine import TorchEngine

    engine = TorchEngine.from_directory(
        Path(directory), precision="bf16", max_batch=64, max_context=1024, threads=threads
    )
    await engine.start()
    for line in iter(sys.stdin.readline, ""):
        words = line.split()
        numbers = [int(word) for word in words[1:]]
        value = (
            (await _rate(engine, *numbers) if words[0] == "rate" else await _ttft(engine, *numbers)) if words else 0.0
        )
        print(f"@ {value}", flush=True)
    await engine.stop()


async def _rate(engine: Any, streams: int, prompt: int, new: int) -> float:
    began = time.perf_counter()
    await asyncio.gather(*(_stream(engine, prompt, new) for _ in range(streams)))
    return streams * new / (time.perf_counter() - began)


async def _ttft(engine: Any, requests: int, prompt: int, new: int) -> float:
    return statistics.median([await _stream(engine, prompt, new) for _ in range(requests)])


async def _stream(engine: Any, prompt: int, new: int) -> float:
    """Generate, and return the seconds to the first token."""
    import random

    from serve.engines.protocol import GenerationRequest, SamplingParams

    ids = tuple(random.choices(range(256, 8192), k=prompt))
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    began, first = time.perf_counter(), 0.0
    async for delta in engine.generate(GenerationRequest("", ids, params)):
        if delta.token_ids:
            first = first or time.perf_counter() - began
    return first


@contextmanager
def echo() -> Iterator[str]:
    """Run Ray Serve's bare echo behind its own proxy, on a Ray of its own; yield its address."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="te-", dir="/tmp") as folder:
        with open(Path(folder) / "log", "wb") as log:
            command = [sys.executable, __file__, "echo", str(port), folder]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            if wait_until(lambda: process.poll() is not None or get(f"{url}/v1/models"), 90) is None or process.poll():
                raise RuntimeError((Path(folder) / "log").read_text(encoding="utf-8")[-2000:])
            yield url
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)


def echo_child(port: int, folder: str) -> None:
    """Be Ray Serve's bare echo until stdin ends."""
    import ray
    from ray import serve

    class Echo:
        async def __call__(self, request: Any) -> Any:
            if request.method == "GET":
                return {"data": [{"id": "echo"}]}
            await request.body()
            return ECHO_ANSWER

    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=f"{folder}/r")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(serve.deployment(Echo, max_ongoing_requests=1000).bind())
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


@contextmanager
def litellm(python: Path, url: str, key: str) -> Iterator[tuple[str, str]]:
    """Run litellm's proxy before `url`; yield its address and how it keeps keys."""
    binary, port = python.with_name("litellm"), free_port()
    config: dict[str, Any] = {
        "model_list": [
            {"model_name": "tiny", "litellm_params": {"model": "openai/tiny", "api_base": f"{url}/v1", "api_key": key}}
        ],
        "general_settings": {"master_key": MASTER_KEY},
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tl-", dir="/tmp")))
        environment = {**os.environ, "PATH": f"{binary.parent}:{os.environ['PATH']}", "LITELLM_TELEMETRY": "False"}
        environment.pop("PYTHONPATH", None)
        kept = _litellm_store(python, stack, environment)
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [str(binary), "--config", str(folder / "config.yaml"), "--host", "127.0.0.1", "--port", str(port)]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        try:
            address = f"http://127.0.0.1:{port}"
            ready = wait_until(lambda: process.poll() is not None or get(f"{address}/v1/models", MASTER_KEY), 90, 0.5)
            if ready is None or process.poll() is not None:
                raise RuntimeError((folder / "log").read_text(encoding="utf-8")[-2000:])
            yield address, kept
        finally:
            process.terminate()
            process.wait(30)


def _litellm_store(python: Path, stack: ExitStack, environment: dict[str, str]) -> str:
    """Give litellm a PostgreSQL where its environment has the client for it; return how it keeps keys."""
    from tests.support import postgres

    has_client = subprocess.run([python, "-c", "import prisma; prisma.Prisma"], capture_output=True, env=environment)
    if has_client.returncode:
        return "its master key alone: prisma's client for PostgreSQL is not generated in its environment"
    if missing := postgres.missing():
        return f"its master key alone: {missing}"
    environment["DATABASE_URL"] = stack.enter_context(postgres.server()).replace("@/", "@localhost/")
    return "a key and PostgreSQL"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1] == "engine":
        asyncio.run(engine_child(sys.argv[2], int(sys.argv[3])))
    else:
        echo_child(int(sys.argv[2]), sys.argv[3])
        shutil.rmtree(f"{sys.argv[3]}/r", ignore_errors=True)
        print(json.dumps({"ended": True}))
