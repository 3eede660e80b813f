"""What `tandem jobs plan` says beside what real engines take on this machine: peak memory and step time.

    python benchmarks/plan.py [--only PATTERN] [--limit 24] [--calibrate] [--steps 4]

Each combination of model, ZeRO stage, ranks, micro-batch, rows' length, offload and precision is planned by its spec,
as `tandem jobs plan` does, then run: worker processes (gloo, without Ray) build the task's model, divide it and learn a
few steps of real rows. Printed for each: planned and measured peak of resident memory (the rank that took most) and
step time (median of all but the first, of the slower rank), and what share of the measured one the plan is off; then
the median and the worst. Memory is compared as a whole, and without what the plan has for a process without a model.

Times need a calibration of this machine: `--calibrate`, or `tandem jobs plan --calibrate` before.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

MODELS: dict[str, dict[str, Any]] = {
    "llama-8M": {"architecture": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
                 "num_attention_heads": 4, "vocab_size": 8000},
    "llama-28M": {"architecture": "llama", "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
                  "num_attention_heads": 6, "vocab_size": 24000},
    "llama-110M": {"architecture": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8,
                   "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 32000},
    "gpt2-29M": {"architecture": "gpt2", "n_embd": 384, "n_layer": 6, "n_head": 6, "vocab_size": 48000,
                 "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}  # fmt: skip


@dataclass(frozen=True)
class Combination:
    """What is planned and run."""

    model: str
    stage: int
    world: int
    micro: int
    length: int
    accumulation: int = 1
    offload: bool = False
    precision: str = "fp32"
    again: bool = False

    @property
    def name(self) -> str:
        """As it is printed."""
        parts = [self.model, f"zero {self.stage}", f"{self.world}r", f"{self.micro}x{self.length}"]
        parts += [f"x{self.accumulation}"] if self.accumulation > 1 else []
        parts += ["offload"] if self.offload else []
        parts += ["again"] if self.again else []
        return " ".join([*parts, self.precision])


SMALL, MIDDLE, LARGE, GPT2 = MODELS
COMBINATIONS = [
    *(Combination(MIDDLE, stage, world, 4, 256) for stage in (0, 1, 2, 3) for world in (1, 2)),
    *(Combination(LARGE, stage, world, 1, 256) for stage in (0, 1, 2, 3) for world in (1, 2)),
    *(Combination(SMALL, stage, 2, 8, 512) for stage in (0, 1, 2, 3)),
    *(Combination(MIDDLE, stage, 2, 2, 256, accumulation=2) for stage in (0, 1, 2, 3)),
    *(Combination(MIDDLE, stage, 2, 2, 256, offload=True) for stage in (1, 2, 3)),
    Combination(SMALL, 2, 1, 2, 2048),
    Combination(MIDDLE, 3, 2, 4, 256, again=True),
    Combination(GPT2, 0, 1, 4, 256),
    Combination(GPT2, 2, 2, 4, 256),
    *(Combination(SMALL, stage, 2, 2, 128, precision="bf16") for stage in (0, 1, 2, 3)),
]


def spec_of(each: Combination) -> dict[str, Any]:
    """Return what is trained."""
    config = dict(MODELS[each.model])
    return {
        "name": "plan",
        "phase": "pretrain",
        "task": {
            "name": "causal-lm",
            "sequence_length": each.length,
            "tokenizer": {"train": "bpe", "vocab_size": 300},
        },
        "data": {"train": "x.jsonl", "eval_fraction": 0},
        "model": {"architecture": config.pop("architecture"), "config": config},
        "training": {
            "steps": 100,
            "global_batch_size": each.micro * each.world * each.accumulation,
            "micro_batch_size": each.micro,
            "precision": each.precision,
            "gradient_checkpointing": each.again,
            "deepspeed": {"zero_stage": each.stage, "offload": "cpu" if each.offload else "none"},
        },
        "resources": {"workers": each.world},
    }


def planned(spec: dict[str, Any], folder: Path) -> tuple[float, int, float | None]:
    """Return the bytes of a rank's peak, those of its process, and the seconds of a step, as the plan has them."""
    from jobs.plan import plan
    from jobs.spec import JobSpec

    made = plan.make(JobSpec.model_validate(spec), folder, plan.Asked(), lambda key: key)
    need = dict(made.needs)[made.chosen]
    return need.unsaved_peak, need.process, made.work.step_s


def measured(spec: dict[str, Any], folder: Path, steps: int) -> list[dict[str, Any]] | str:
    """Run the ranks; return what each left, or what they printed if one failed."""
    from jobs.checkpoint.torch_internals import HUGE_PAGES
    from jobs.data.prepare import prepare
    from jobs.spec import JobSpec

    (folder / "spec.json").write_text(json.dumps(spec))
    words = "\n".join(json.dumps({"text": f"{n} men went to mow a meadow. " * 60}) for n in range(400))
    (folder / "x.jsonl").write_text(words)
    found = prepare(JobSpec.model_validate(spec), folder, folder / "s", parent=None, on_progress=lambda *_: None)
    (folder / "prepared").write_bytes(pickle.dumps(found))
    world = spec["resources"]["workers"]
    environment = {**os.environ, **HUGE_PAGES, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "benchmarks" / "plan_rank.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), str(folder), str(steps)],
            env={**environment, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        return "\n".join(outputs)[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]


@dataclass
class Errors:
    """Shares of the measured value, with sign, over the combinations."""

    memory: list[float]
    memory_of_model: list[float]
    step: list[float]


def compare(each: Combination, steps: int, errors: Errors, verbose: bool) -> None:
    """Plan and run a combination, and print both."""
    spec = spec_of(each)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        peak, process, step_s = planned(spec, folder)
        found = measured(spec, folder, steps)
    if isinstance(found, str):
        raise SystemExit(f"{each.name} failed:\n{found}")
    last = max(max(rank["peaks"].values()) for rank in found)
    taken = max(rank["step_s"] for rank in found)
    errors.memory.append(peak / last - 1)
    errors.memory_of_model.append((peak - process) / (last - process) - 1)
    line = f"{each.name:<34} {peak / 2**20:>8,.0f} {last / 2**20:>8,.0f} {errors.memory[-1]:>+7.1%}"
    line += f" {errors.memory_of_model[-1]:>+8.1%}"
    if step_s is not None:
        errors.step.append(step_s / taken - 1)
        line += f" {step_s:>8.3f} {taken:>8.3f} {errors.step[-1]:>+7.1%}"
    print(line if step_s is not None else f"{line}          {taken:>8.3f}", flush=True)
    if verbose:
        phases = found[0]["peaks"].items()
        print("    " + ", ".join(f"{name} {count / 2**20:,.0f}" for name, count in phases), flush=True)


def main() -> None:
    """Compare each combination and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only combinations whose name contains this")
    parser.add_argument("--limit", type=int, default=len(COMBINATIONS), help="only so many")
    parser.add_argument("--steps", type=int, default=4, help="steps of each (default 4)")
    parser.add_argument("--calibrate", action="store_true", help="measure this machine's rates first")
    parser.add_argument("--verbose", action="store_true", help="print the first rank's peak after each phase, too")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chosen = [each for each in COMBINATIONS if arguments.only in each.name][: arguments.limit]
    if not chosen:
        parser.error(f"--only {arguments.only}: none of {', '.join(each.name for each in COMBINATIONS)}")
    if arguments.calibrate:
        calibrate({each.precision for each in chosen})
    print(f"{'':<34} {'planned':>8} {'measured':>8} {'error':>7} {'of model':>8} {'planned':>8} {'measured':>8} error")
    print(f"{'':<34} {'MiB':>8} {'MiB':>8} {'':>7} {'':>8} {'s':>8} {'s':>8}")
    errors = Errors([], [], [])
    for each in chosen:
        compare(each, arguments.steps, errors, arguments.verbose)
    print()
    for what, values in (
        ("peak memory", errors.memory),
        ("peak memory without the process", errors.memory_of_model),
        ("step time", errors.step),
    ):
        sizes = [abs(value) for value in values]
        if sizes:
            print(f"{what}: median error {statistics.median(sizes):.1%}, worst {max(sizes):.1%}, of {len(sizes)}")
    if not errors.step:
        print("step time: no calibration of this machine; add --calibrate")


def calibrate(precisions: set[str]) -> None:
    """Measure this machine as `tandem jobs plan --calibrate` does."""
    from cluster.home import home
    from jobs.plan import calibrate as calibration
    from jobs.plan import rates

    for precision in sorted(precisions):
        for found in calibration.measure(precision, 1, say=print):  # type: ignore[arg-type]
            rates.keep(home(), found)


if __name__ == "__main__":
    main()
