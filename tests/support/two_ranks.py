"""Two processes of one module, which meet as the ranks of a group on this machine.

python tests/support/two_ranks.py MODULE FOLDER CASE…      calls `run(case, rank, FOLDER)` of tests/support/MODULE.py

They are forked off one process that has imported what both need: those seconds are spent once.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(module: str, folder: Path, cases: Sequence[str], timeout_s: float = 180) -> None:
    """Run every case as both ranks; fail with what they print if one does."""
    command = [sys.executable, str(Path(__file__)), module, str(folder), *cases]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    environment["OMP_NUM_THREADS"] = "1"
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as ranks:
        try:
            output = ranks.communicate(timeout=timeout_s)[0]
        except BaseException:
            os.killpg(ranks.pid, signal.SIGKILL)
            raise
    assert ranks.returncode == 0, output[-8000:]


def begin_run(case: str, rank: int, folder: Path) -> None:
    """Make the folder of a case's run, FOLDER/<CASE>/run, and have both ranks wait for it."""
    import torch.distributed as dist

    from jobs.run_folder import RunFolder

    (folder / case / "run").mkdir(parents=True, exist_ok=True)
    if rank == 0:
        RunFolder(folder / case / "run").begin()
    dist.barrier()


def _meet(run_case: Callable[[str, int, Path], None], rank: int, folder: Path, cases: Sequence[str]) -> None:
    """Be a rank: meet the other one, run the cases."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    for case in cases:
        run_case(case, rank, folder)
    dist.destroy_process_group()


def main(module: str, folder: Path, cases: Sequence[str]) -> int:
    """Import what ranks need; return 0 if they have run all cases."""
    from jobs.worker.deepspeed_internals import import_deepspeed

    run_case = importlib.import_module(f"tests.support.{module}").run
    import_deepspeed()
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_meet, args=(run_case, rank, folder, cases)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return int(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
