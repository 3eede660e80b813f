"""The tests that depend on the CPU's instructions, once more as a CPU with no more than AVX2 runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.precision import this_cpu
from tests.support.machine import PLAIN_CPU

ROOT = Path(__file__).parents[2]
FILES = (
    "tests/integration/test_jobs_quantize.py",
    "tests/integration/test_serve_torch_engine.py",
    "tests/unit/test_jobs_tasks.py",
    "tests/unit/test_serve_linear.py",
)
NEED_MORE = ("oneDNN's own layout", "keeps oneDNN from")
"""Parts of the reasons for which tests are skipped there: they are about instructions that such a CPU lacks."""


@pytest.mark.skipif(not this_cpu().bf16, reason=f"a CPU with bf16 instructions: {this_cpu().reason}")
def test_what_depends_on_instructions_passes_with_avx2_alone() -> None:
    command = (sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-m", "instructions", *FILES)
    done = subprocess.run(command, env={**os.environ, **PLAIN_CPU}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    skips = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert [line for line in skips if not any(part in line for part in NEED_MORE)] == []
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 50


def test_every_file_with_such_tests_runs_there() -> None:
    marked = "pytest.mark." + "instructions"
    found = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/*/test_*.py") if marked in path.read_text()}
    assert found == set(FILES)
