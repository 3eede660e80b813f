"""Peak memory of each rank of a training, by phase; another commit's beside.

    python benchmarks/model_memory.py [--sizes 400M 1B] [--ranks 2] [--against CHECKOUT] [--precision fp32] [--stage 3]
        [--until construct] [--tokens 64]

A Llama with random weights begins, learns two steps, is saved and exported; then new processes resume it and learn.
Peaks are of resident memory (VmHWM, which the kernel begins anew for each phase), the largest of the ranks; `state` is
what has to be there by jobs/plan/memory.py (stage 3: 16 bytes a parameter over the ranks in fp32, 18 in bf16). The
ranks are forked, as workers are, and what they imported counts in each one's peak and once in the machine: `together`
is how much less memory the machine had. Where less than 0.5 GiB is left, the processes are ended, and "did not fit" is
printed after the phases that did.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

SIZES: dict[str, dict[str, int]] = {
    "14M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4},
    "140M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "400M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 26, "num_attention_heads": 16},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 17, "num_attention_heads": 16},
}
PHASES = ("construct", "first step", "second step", "save", "evaluation", "export")
Found = dict[str, list[list[float]]]
VOCABULARY = 32000
LEAST_BYTES = 1 << 29


def parameters(size: dict[str, int]) -> int:
    """Return how many a Llama has: embedding and head, and a layer's four projections, gated MLP and norms."""
    hidden, between = size["hidden_size"], size["intermediate_size"]
    layer = 4 * hidden * hidden + 3 * hidden * between + 2 * hidden
    return 2 * VOCABULARY * hidden + size["num_hidden_layers"] * layer + hidden


def spec_of(size: str, precision: str, stage: int, tokens: int) -> dict[str, Any]:
    """Return what is trained."""
    return {
        "name": "memory",
        "phase": "pretrain",
        "task": {"name": "causal-lm", "sequence_length": tokens, "tokenizer": {"train": "bpe", "vocab_size": 300}},
        "data": {"train": "x.jsonl"},
        "model": {"architecture": "llama", "config": {**SIZES[size], "vocab_size": VOCABULARY}},
        "training": {"steps": 2, "global_batch_size": 2, "precision": precision, "deepspeed": {"zero_stage": stage}},
    }


def prepared(folder: Path, spec: dict[str, Any], zero: str) -> None:
    """Leave the spec, its rows, and what DeepSpeed is told besides, in a folder."""
    from jobs.data.prepare import prepare
    from jobs.spec import JobSpec

    (folder / "spec.json").write_text(json.dumps(spec))
    (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": f"{n} men went to mow. " * 9}) for n in range(200)))
    found = prepare(JobSpec.model_validate(spec), folder, folder / "s", parent=None, on_progress=lambda *_: None)
    (folder / "config.json").write_text(zero)
    (folder / "prepared").write_bytes(pickle.dumps(found))


def ranks(checkout: Path, folder: Path, world: int, way: str, last: str) -> tuple[Found, str | None]:
    """Run one way on all ranks; return (MiB, seconds) of each rank by phase, and why it ended early."""
    script = str(ROOT / "benchmarks" / "model_memory_rank.py")
    environment = {**os.environ, "PYTHONPATH": str(checkout), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, str(world), str(folder), way, last]
    with (folder / f"{way}.log").open("w") as log:
        launcher = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        why, together = watch(launcher)
    paths = [folder / f"{way}-{rank}.json" for rank in range(world)]
    found = [json.loads(path.read_text()) if path.is_file() else {} for path in paths]
    ended = [name for name in found[0] if all(name in each for each in found)]
    print(f"  {way}: together at most {together / 2**20:,.0f} MiB")
    return {name: [each[name] for each in found] for name in ended}, why


def watch(launcher: subprocess.Popen[bytes]) -> tuple[str | None, int]:
    """Wait for the ranks; end them all where one fails or memory runs out. Return why, and the bytes that they took."""
    began = least = available()
    while launcher.poll() is None and least >= LEAST_BYTES:
        time.sleep(0.05)
        least = min(least, available())
    why = "failed" if launcher.poll() else None if launcher.poll() == 0 else "did not fit"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    return why, began - least


def available() -> int:
    """Return the machine's memory that processes may still take, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def measure(name: str, checkout: Path, size: str, options: argparse.Namespace) -> None:
    """Print a table of one commit and size."""
    from jobs.plan import memory
    from jobs.plan.facts import Facts

    world, precision, stage = options.ranks, options.precision, options.stage
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "run").mkdir()
        prepared(folder, spec_of(size, precision, stage, options.tokens), options.zero)
        count = parameters(SIZES[size])
        setting = memory.Setting(stage, "none", precision, world, on_gpu=False)
        need = memory.need(Facts(size, count, count, 0, 0, count), setting)
        state = (need.state - need.process) / 2**20
        print(f"\n{name}: {size} ({count / 1e6:,.0f}M parameters), {precision}, stage {stage}, {world} ranks:", end=" ")
        print(f"state {state:,.0f} MiB each")
        for way in ("begin",) if options.until else ("begin", "resume"):
            found, why = ranks(checkout, folder, world, way, options.until or "export")
            for phase, values in found.items():
                peak, seconds = max(each[0] for each in values), max(each[1] for each in values)
                print(f"    {phase:<12} {peak:>8,.0f} MiB {seconds:>7.1f} s", flush=True)
            if why:
                print(f"    then: {why}", flush=True)
                if why == "failed":
                    print((folder / f"{way}.log").read_text()[-3000:])
                return


def main() -> None:
    """Measure each size of each commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["400M", "1B"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], default=3)
    parser.add_argument("--tokens", type=int, default=64, help="in the row that each rank learns from (default 64)")
    parser.add_argument("--zero", default="{}", help="JSON: settings of DeepSpeed's zero_optimization")
    parser.add_argument("--against", type=Path, help="a checkout of another commit, measured beside")
    parser.add_argument("--until", choices=PHASES, help="end after this phase, and resume nothing")
    arguments = parser.parse_args()
    commits = {"here": ROOT} | ({"there": arguments.against.resolve()} if arguments.against else {})
    for size in arguments.sizes:
        for name, checkout in commits.items():
            measure(name, checkout, size, arguments)


if __name__ == "__main__":
    main()
