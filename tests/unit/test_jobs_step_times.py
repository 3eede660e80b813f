"""Where a step's time goes, and the memory that a rank has had."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from jobs.worker.meter import Meter, rates_of
from jobs.worker.peak_memory import peak_bytes, resident_peak
from jobs.worker.step_times import DeviceClock, HostClock, StepTimes
from tests.support import machine
from tracking.spool import Spool


class LateClock:
    """A device that is behind: moments are numbers, and have come once `now` is there."""

    def __init__(self) -> None:
        self.now, self._marks = 0, 0

    def mark(self) -> int:
        self._marks += 1
        return self._marks

    def passed(self, moment: int) -> bool:
        return moment <= self.now

    def seconds(self, begin: int, end: int) -> float:
        return float(end - begin)


def step_of(times: StepTimes, *parts: str) -> None:
    for part in parts:
        with times.during(part):
            pass


def test_the_parts_of_a_step_are_added_up_over_its_micro_batches() -> None:
    clock = LateClock()
    times = StepTimes(clock)
    clock.now = 100
    step_of(times, "forward", "backward", "forward", "backward", "optimizer")
    assert times.end(7) == [(7, {"forward_s": 2.0, "backward_s": 2.0, "optimizer_s": 1.0})]
    step_of(times, "forward")
    assert times.end(8) == [(8, {"forward_s": 1.0})], "each step begins anew"


def test_a_step_that_the_device_has_not_done_is_told_with_a_later_one_under_its_own_number() -> None:
    clock = LateClock()
    times = StepTimes(clock)
    step_of(times, "forward", "optimizer")  # moments 1 to 4
    clock.now = 3
    assert times.end(1) == []
    step_of(times, "forward")  # 5, 6
    clock.now = 4
    assert times.end(2) == [(1, {"forward_s": 1.0, "optimizer_s": 1.0})]
    clock.now = 8
    step_of(times, "forward")
    assert [step for step, _ in times.end(3)] == [2, 3]


def test_a_part_within_another_counts_in_both() -> None:
    clock = LateClock()
    times = StepTimes(clock)
    clock.now = 100
    with times.during("step"), times.during("forward"):
        pass
    assert times.end(1) == [(1, {"forward_s": 1.0, "step_s": 3.0})]


def test_the_host_tells_at_once_what_a_part_took() -> None:
    times, began = StepTimes(HostClock()), time.perf_counter()
    with times.during("forward"):
        time.sleep(0.02)
    with times.during("backward"):
        pass
    took = time.perf_counter() - began
    ((step, parts),) = times.end(1)
    assert step == 1
    assert parts["forward_s"] >= 0.02
    assert parts["forward_s"] + parts["backward_s"] <= took, "each has its own time"


def communicated(folder: Path, ranks: int) -> list[dict[str, float]]:
    """Return what two steps of a meter tell, of which the first communicates within a part, the second outside."""
    meter = Meter(torch.device("cpu"), 0, Spool(folder / f"{ranks}.jsonl"), folder, ranks=ranks)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with meter.during("backward"):
            handle = dist.all_reduce(torch.ones(2), async_op=True)
        with meter.during("optimizer"):
            handle.wait()
        meter.end_step(1, {"step_time_s": 1.0}, math.nan)
        with meter.during("optimizer"):
            pass
        dist.all_reduce(torch.ones(2))
        meter.end_step(2, {"step_time_s": 1.0}, math.nan)
    finally:
        meter.close()
        dist.destroy_process_group()
    return [metrics for _, metrics in spooled(folder / f"{ranks}.jsonl")]


def test_what_is_communicated_within_a_steps_parts_is_told_beside_them(tmp_path: Path) -> None:
    first, second = communicated(tmp_path, 2)
    assert 0 < first["communication_s"] <= first["backward_s"] + first["optimizer_s"]
    assert "communication_s" not in second, "between the parts, for a checkpoint: no part of a step"
    assert not any("communication_s" in step for step in communicated(tmp_path, 1)), "one rank has nobody"


@pytest.mark.skipif(not machine.has_gpu(), reason="no GPU")
def test_a_gpu_tells_what_it_took_and_not_what_the_call_took() -> None:
    clock, matrix = DeviceClock(), torch.rand(8192, 8192, device="cuda")
    begin = clock.mark()
    for _ in range(20):
        matrix = matrix @ matrix.softmax(-1)
    end = clock.mark()
    assert not clock.passed(end)
    torch.cuda.synchronize()
    assert clock.passed(end)
    assert clock.seconds(begin, end) > 0.01


def spooled(path: Path) -> list[tuple[int, dict[str, float]]]:
    return [(line["step"], line["metrics"]) for line in map(json.loads, path.read_text().splitlines())]


def test_rank_0_writes_a_steps_metrics_with_its_parts_and_every_rank_its_memory(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    meters = [Meter(cpu, rank, Spool(tmp_path / "rank-0.jsonl") if rank == 0 else None, tmp_path) for rank in range(2)]
    for meter in meters:
        with meter.during("forward"):
            pass
        meter.end_step(1, {"loss": 2.0, "step_time_s": 0.5}, 3e9)
        meter.end_step(2, {"loss": 1.0, "step_time_s": 0.5}, math.nan)
        meter.close()
    (first, parts), second = spooled(tmp_path / "rank-0.jsonl")
    assert (first, parts["loss"], parts["model_flops_per_second"]) == (1, 2.0, 6e9)
    assert sorted(parts) == ["forward_s", "loss", "model_flops_per_second", "step_time_s"]
    assert second == (2, {"loss": 1.0, "step_time_s": 0.5})
    for rank in range(2):
        ((step, memory), *_) = spooled(tmp_path / f"memory-rank-{rank}.jsonl")
        assert step == 1
        assert 0 < memory[f"peak_memory_bytes/rank-{rank}"] <= peak_bytes(cpu)


def test_the_share_of_the_peak_is_told_where_all_of_it_is_known() -> None:
    assert rates_of(4e12, 2.0, 8e12) == {"model_flops_per_second": 2e12, "mfu": 0.25}
    assert rates_of(4e12, 2.0, math.nan) == {"model_flops_per_second": 2e12}
    assert rates_of(math.nan, 2.0, 8e12) == {}
    assert rates_of(0.0, 2.0, 8e12) == {}, "a model of no products"


def test_the_resident_peak_is_read_in_bytes() -> None:
    assert resident_peak("Name:\tpython\nVmPeak:\t 900 kB\nVmHWM:\t  226760 kB\nVmRSS:\t   100 kB\n") == 226760 * 1024
    assert resident_peak("Name:\tkthreadd\n") == 0


def test_memory_is_told_again_only_once_it_has_grown(tmp_path: Path) -> None:
    """In a process of its own, whose peak no other test has made."""
    code = (
        "import sys, torch; from pathlib import Path; from jobs.worker.peak_memory import PeakMemory, peak_bytes\n"
        "memory = PeakMemory(Path(sys.argv[1]), 3, torch.device('cpu'))\n"
        "memory.note(1); memory.note(2)\n"
        "held = torch.ones(64 << 20, dtype=torch.uint8); del held\n"
        "memory.note(3); memory.close()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
    (first, before), (last, after) = spooled(tmp_path / "memory-rank-3.jsonl")
    key = "peak_memory_bytes/rank-3"
    assert (first, last) == (1, 3)
    assert 60 << 20 < after[key] - before[key] < 80 << 20
