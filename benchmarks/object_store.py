"""The same training job on a folder and on an object store, side by side in one run: what the store costs.

    python benchmarks/object_store.py [--sizes tiny 30M] [--steps 60] [--every 6] [--kills 2]

The store is moto's S3 server on loopback, in a process of its own that answers one request at a time. Two workers of
one thread train at ZeRO stage 3; at seeded steps one of them is killed. Printed, for the folder, for the store, and
the store's over the folder's:

    stall        s that the training thread waits for a save, median over the saves
    saved        s from a save's begin until its checkpoint counts, median
    next step    s from the kill of a worker to the next step, median over the kills
    exported     s from the last step's end, or its save's where that ends later, until the workers have their model
    published    s from the last step until the run is noted as finished: its model is where others find it

and floors: the bytes of a checkpoint, and of the model, over what two writers at once get there, measured in the same
run by the same calls (a disk's with fsync), and over what moto takes from a bare HTTP client.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
LARGE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
"""With a vocabulary of 8,192 an embedding and a head that share their weight: 30 million parameters."""
SIGNED = {
    "Content-Type": "application/octet-stream",
    "Authorization": "AWS4-HMAC-SHA256 Credential=tandem/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, "
    "Signature=0",
}
"""By which moto knows a request of S3's; it does not look at the signature."""
ROUNDS = 3
"""So often bandwidth is measured; the best counts, as a floor."""


@dataclass
class Found:
    """What one job came to."""

    stall_s: float
    saved_s: float
    next_step_s: float
    exported_s: float
    published_s: float
    checkpoint_bytes: int
    model_bytes: int


def main() -> None:
    """Run all jobs and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "30M"), default=["tiny", "30M"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=6, help="steps between two saves (default 6)")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="to-", dir="/tmp"))
    os.environ["TANDEM_HOME"] = str(work)

    import pytest

    from cluster import local
    from tests.support import moto_server

    with pytest.MonkeyPatch.context() as patch, moto_server.running(patch) as server:
        local.up(cpus=4, progress=lambda message: print(message, file=sys.stderr))
        try:
            for size in options.sizes:
                folder = measured(work, size, str(work / "storage"), options)
                store = measured(work, size, server.uri("bucket/tandem"), options)
                tell(size, folder, store, work, server)
        finally:
            local.down()


def measured(work: Path, size: str, storage: str, options: argparse.Namespace) -> Found:
    """Run one job, kill its workers now and then, and read what it has noted."""
    from jobs import submit
    from tests.support.fault_runs import workers

    kind = "store" if "://" in storage else "folder"
    name = f"{kind}-{size}".lower()
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec_of(size, name, storage, options)))
    job = submit.submit(path, [])
    chance, killed = random.Random(options.seed), list[float]()
    for number in range(1, options.kills + 1):
        # Between two saves, so that steps are done again, as most often.
        at = options.steps * number // (options.kills + 1) // options.every * options.every + options.every // 2
        wait_until(lambda at=at: newest_step(work, name) >= at, 300)
        chance.choice(sorted(workers(), key=lambda p: p.pid)).send_signal(signal.SIGKILL)
        killed.append(time.time())
        print(f"  {name}: kill {number}", file=sys.stderr)
    outcome = submit.follow(job, lambda line, meaning: None)
    if outcome.status != "SUCCEEDED":
        raise SystemExit("\n".join(outcome.log[-30:]))
    return read(run_of(work, name), killed)


def read(run: Path, killed: list[float]) -> Found:
    """Return the figures of a run that has ended; `killed`: when workers were."""
    records = records_of(run)
    steps = [(r["time_ms"] / 1000, r["step"]) for r in records if "step_time_s" in r["metrics"]]
    saves = [(r["time_ms"] / 1000, r["metrics"]) for r in records if "checkpoint_s" in r["metrics"]]
    last = max(at for at, _ in steps)
    exported_at = (run / "evaluations.json").stat().st_mtime
    before = max([last, *(at for at, _ in saves if at < exported_at)])
    weights = json.loads((run / "model" / "tandem.json").read_text()).get("files", {})
    return Found(
        statistics.median(m["checkpoint_stall_s"] for _, m in saves),
        statistics.median(m["checkpoint_s"] for _, m in saves),
        statistics.median(min(at for at, _ in steps if at > kill + 0.5) - kill for kill in killed),
        exported_at - before,
        (run / "status.json").stat().st_mtime - last,
        int(saves[-1][1]["checkpoint_bytes"]),
        sum(int(each["bytes"]) for name, each in weights.items() if name.endswith(".safetensors")) or stored_bytes(run),
    )


def stored_bytes(run: Path) -> int:
    """Return the bytes of weights that lie in a store."""
    from cluster import stored_weights

    found = stored_weights.read(run / "model")
    return found.bytes if found is not None else 0


def spec_of(size: str, name: str, storage: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the job: the fault tests' small one, or the same with a larger model."""
    from tests.support.fault_runs import SPEC

    model, data = SPEC["model"], {**SPEC["data"], "max_examples": 150}
    if size != "tiny":
        model = {**model, "config": {**LARGE, "tie_word_embeddings": True}}
        data = {**data, "tokenizer": {"train": "bpe", "vocab_size": 8192}}
    return {
        **{**SPEC, "name": name, "model": model, "data": data, "storage": storage},
        "training": {**SPEC["training"], "steps": options.steps, "global_batch_size": 4, "schedule": "constant"},
        "checkpoint": {"every_steps": options.every, "keep": 2, "resume": "never"},
        "max_failures": 10,
    }


def tell(size: str, folder: Found, store: Found, work: Path, server: Any) -> None:
    """Print both, and the floors."""
    megabytes = f"{folder.checkpoint_bytes / 1e6:,.1f} MB, weights of {folder.model_bytes / 1e6:,.1f} MB"
    print(f"\n{size}: checkpoints of {megabytes}")
    print(f"{'':14}{'folder':>9}{'store':>9}{'ratio':>8}")
    for name in ("stall_s", "saved_s", "next_step_s", "exported_s", "published_s"):
        one, other = getattr(folder, name), getattr(store, name)
        label = name.removesuffix("_s").replace("_", " ")
        print(f"{label:14}{one:9.3f}{other:9.3f}" + (f"{other / one:8.2f}" if one else "       –"), flush=True)
    half = max(1, folder.checkpoint_bytes // 2)
    disk, s3, bare = (
        bandwidth(str(work / "probe"), half),
        bandwidth(server.uri("bucket/probe"), half),
        bare_rate(server, half),
    )
    print(f"two writers    disk {disk / 1e6:,.0f} MB/s, store {s3 / 1e6:,.0f} MB/s")
    print(f"moto           from two bare clients {bare / 1e6:,.0f} MB/s")
    for label, size_bytes, of, rate in (
        ("saved, folder", folder.checkpoint_bytes, folder.saved_s, disk),
        ("saved, store", store.checkpoint_bytes, store.saved_s, s3),
        ("exported, folder", folder.model_bytes, folder.exported_s, disk),
        ("exported, store", store.model_bytes, store.exported_s, s3),
    ):
        floor = size_bytes / rate
        print(f"{label:18}{of:8.3f} s, floor {floor:.3f} s: {of / floor:,.1f} times")


def bandwidth(place: str, size: int) -> float:
    """Return the bytes/s that two writers at once get, by the calls by which checkpoints are written."""
    from jobs.checkpoint.store import Store

    content, best = os.urandom(size), 0.0
    for number in range(ROUNDS):
        began = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda rank: Store(place).write(f"{number}/{rank}", [content]), range(2)))  # noqa: B023
        best = max(best, 2 * size / (time.perf_counter() - began))
        Store(place).remove(str(number))
    return best


def bare_rate(server: Any, size: int) -> float:
    """Return the bytes/s that the server takes from two clients that do nothing else."""
    content = os.urandom(size)

    def put(rank: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("PUT", f"/bucket/bare-{rank}", content, SIGNED)
        assert connection.getresponse().status == 200, "it takes what is not signed truly"
        connection.close()

    best = 0.0
    for _ in range(ROUNDS):
        began = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(put, range(2)))
        best = max(best, 2 * size / (time.perf_counter() - began))
    return best


def run_of(work: Path, name: str) -> Path:
    """Return a run's folder on this node."""
    found = sorted([*(work / "storage" / "runs").glob(f"{name}-*"), *(work / "stores").glob(f"*/runs/{name}-*")])
    return found[-1] if found else work / "none"


def records_of(run: Path) -> list[dict[str, Any]]:
    """Return what the first rank of a job has spooled."""
    spool = run / "spool" / "rank-0.jsonl"
    lines = spool.read_bytes().split(b"\n") if spool.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"}")]


def newest_step(work: Path, name: str) -> int:
    """Return how many steps a job has done; 0 before the first."""
    return max([0, *(r["step"] for r in records_of(run_of(work, name)) if "step_time_s" in r["metrics"])])


def wait_until(condition: Any, timeout_s: float) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the job did not come so far")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
