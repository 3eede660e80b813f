"""Two processes of one script, which meet as the ranks of a group on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(script: str, folder: Path, cases: Sequence[str], timeout_s: float = 180) -> None:
    """Run tests/support/<script> RANK STORE_FILE FOLDER CASE… as both ranks; fail with what they print if one does."""
    command = [sys.executable, str(ROOT / "tests" / "support" / script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    environment["OMP_NUM_THREADS"] = "1"
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "meeting"), str(folder), *cases],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=timeout_s)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)[-8000:]
