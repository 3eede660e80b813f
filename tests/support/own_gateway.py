"""An endpoint without Ray, for attacks on it: the gateway's server and a model's replica, each a process of its own.

What Ray Serve adds is where replicas are found: here the replica tells it through a pipe.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import psutil

from serve.front.limits import Limits

ACCESS_LOG = "access.jsonl"
SECRET = b"s" * 32
TOLD_S = 0.05
"""How often the replica tells how it is."""
START_S = 60.0


@dataclass(frozen=True)
class Setup:
    """What the two processes are made with."""

    directory: Path
    """The model's."""
    folder: Path
    """Where the access log goes."""
    limits: Limits
    slots: Mapping[str, int]
    """Sequences that each model works on at once, by the model's name."""
    max_queued: int = 256
    max_wait_s: float = 60.0


@dataclass
class Running:
    """The endpoint while it runs."""

    url: str
    gateway: psutil.Process
    replica: psutil.Process
    setup: Setup

    @property
    def port(self) -> int:
        """The gateway's."""
        return int(self.url.rsplit(":", 1)[1])

    def gauge(self, name: str) -> float:
        """Return a number of /metrics, of all models together."""
        lines = httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))

    def logged(self) -> list[dict[str, Any]]:
        """Return the lines of the access log."""
        log = self.setup.folder / ACCESS_LOG
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def rss_mib(self) -> float:
        """Return the memory of the gateway's process."""
        return float(self.gateway.memory_info().rss / 2**20)

    def is_idle(self) -> bool:
        """Say whether nothing runs and nothing waits, as /metrics tells it."""
        return self.gauge("tandem_requests_running") == self.gauge("tandem_requests_waiting") == 0


@contextmanager
def running(setup: Setup) -> Iterator[Running]:
    """Serve the model until the block ends."""
    spawn = multiprocessing.get_context("spawn")
    telling, hearing = spawn.Pipe()
    url_here, url_there = spawn.Pipe()
    jobs = ((_replica, (setup, telling)), (_gateway, (setup, hearing, url_there)))
    replica, gateway = (spawn.Process(target=target, args=arguments, daemon=True) for target, arguments in jobs)
    try:
        replica.start()
        gateway.start()
        for end in (telling, hearing, url_there):  # so that each process learns when the other has ended
            end.close()
        assert url_here.poll(START_S), "the gateway does not listen"
        yield Running(url_here.recv(), psutil.Process(gateway.pid), psutil.Process(replica.pid), setup)
    finally:
        for process, patience_s in ((gateway, 0), (replica, 10)):
            if process.pid is not None:
                process.join(patience_s)
                process.kill()
                process.join()


def until(condition: Callable[[], bool], limit_s: float, otherwise: str) -> float:
    """Wait for a condition; return how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s, otherwise
        time.sleep(0.02)
    return time.monotonic() - began


# -- the replica's process --------------------------------------------------------------------------------------------


def _replica(setup: Setup, telling: Connection) -> None:
    asyncio.run(_serve_model(setup, telling))


async def _serve_model(setup: Setup, telling: Connection) -> None:
    from serve.channel.server import Server
    from serve.deploy.model_replica import answered
    from serve.engines import sampling_defaults
    from serve.engines.replica import GenerativeReplica
    from serve.engines.torch.torch_engine import TorchEngine
    from serve.wire import Identity, ReplicaState

    served: list[tuple[str, Any, Server]] = []
    for model, slots in setup.slots.items():
        engine = TorchEngine.from_directory(setup.directory, precision="fp32", max_batch=slots, threads=1)
        replica = GenerativeReplica(engine, Identity("1", None), sampling_defaults.read(setup.directory))
        await replica.start()
        server = Server(f"replica-of-{model}", slots, SECRET, partial(answered, replica))
        await server.start("127.0.0.1")
        served.append((model, replica, server))
    with suppress(BrokenPipeError):  # the gateway has ended
        while True:
            states = [
                ReplicaState(model, server.replica_id, "1", each.load(), each.describe(), server.address, server.slots)
                for model, each, server in served
            ]
            telling.send(states)
            await asyncio.sleep(TOLD_S)
    for _, replica, server in served:
        await server.close()
        await replica.stop()


# -- the gateway's process --------------------------------------------------------------------------------------------


def _gateway(setup: Setup, hearing: Connection, telling: Connection) -> None:
    import uvloop

    uvloop.run(_serve_http(setup, hearing, telling))


async def _serve_http(setup: Setup, hearing: Connection, telling: Connection) -> None:
    from serve.api import routes
    from serve.api.admission import Admission
    from serve.api.gateway import Gateway, ModelCard
    from serve.api.own_rates import OwnRates
    from serve.deploy.access import Queue, Standing, slots_of, window
    from serve.fair.turns import Turns
    from serve.front.access_log import AccessLog
    from serve.front.app import Front
    from serve.front.exchange import Exchange
    from serve.front.server import Server
    from serve.metrics import watch

    queues = {model: Queue(slots, setup.max_queued, setup.max_queued) for model, slots in setup.slots.items()}
    alone = Standing(1, 1)
    turns = {
        model: Turns(window(each, alone), each.most, each.most_per_key, slots=slots_of(each, alone))
        for model, each in queues.items()
    }
    backend = _backend(setup, turns)
    gateway = Gateway(backend, 2**20, 64, admission=Admission(OwnRates(), None, turns.__getitem__, setup.max_wait_s))
    gateway.catalog = {model: ModelCard(model, "causal-lm", "1", True, 1700000000, {}) for model in setup.slots}
    log = AccessLog(setup.folder / ACCESS_LOG)
    log.start()

    def ended(one: Exchange) -> None:
        watch.count_refused(gateway.metrics.record, one)
        log.add(one)

    server = Server(Front(routes.build(lambda: gateway), ended), "127.0.0.1", 0, setup.limits, log=ended)
    loop, heard = asyncio.get_running_loop(), asyncio.Event()

    def hear() -> None:
        backend.told = hearing.recv()
        backend._heard(backend.told)
        heard.set()

    loop.add_reader(hearing.fileno(), hear)
    await heard.wait()
    await server.start()
    telling.send(f"http://127.0.0.1:{server.port}")
    await asyncio.Event().wait()


def _backend(setup: Setup, turns: Mapping[str, Any]) -> Any:
    from serve.deploy.backend import RayBackend
    from serve.wire import ReplicaState

    class Known(RayBackend):
        """Has its replicas from a pipe, where others ask Ray's actor."""

        told: Sequence[ReplicaState] = ()

        async def states(self) -> tuple[list[ReplicaState], Counter[str]]:
            return list(self.told), self.pending + Counter({model: each.waiting for model, each in turns.items()})

    return Known("x", SECRET, setup.max_wait_s)
