"""What a plan says of a rank's state, held against the tensors that engines of DeepSpeed have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.plan import memory
from jobs.plan.facts import Facts

ROOT = Path(__file__).parents[2]
CASES = [f"{stage}-{precision}" for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
CASES.append("1-bf16-muon")
MATRICES = 4 * (4 * 256 * 256 + 3 * 256 * 704) / 5_261_568
"""The share of that model that Muon trains: the rest is embeddings, the head and norms."""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("held")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    command = [sys.executable, str(ROOT / "tests/support/plan_rank.py"), str(folder), *CASES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {case: json.loads((folder / f"{case}.json").read_text()) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_an_engine_holds_what_the_plan_says(held: dict[str, float], case: str) -> None:
    stage, precision, *muon = case.split("-")
    count = 10**7
    setting = memory.Setting(int(stage), "none", precision, 1, on_gpu=False, optimizer=(muon or ["adamw"])[0])  # type: ignore[arg-type]
    need = memory.need(Facts("x", count, count, 0, 0, count, matrices=round(MATRICES * count)), setting)
    assert held[case] == pytest.approx((need.state - need.process) / count, rel=0.02)


def test_two_ranks_peak_where_the_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the process that each rank has before it has a model, as a run's own plan goes."""
    from benchmarks import plan as benchmark

    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = benchmark.spec_of(benchmark.Combination(benchmark.MIDDLE, 2, 2, 1, 64))
    planned, process, _ = benchmark.planned(spec, tmp_path)
    found = benchmark.measured(spec, tmp_path, 2)
    assert not isinstance(found, str), found
    for rank in found:
        expected = planned - process + rank["process"] + memory.ENGINE
        assert max(rank["peaks"].values()) == pytest.approx(expected, rel=0.15)
        assert expected - rank["process"] > 300 << 20, "most of it is the model's"
