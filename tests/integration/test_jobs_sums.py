"""Gradients are summed over the ranks once, also those that are large enough to be summed where they lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import two_ranks

CASES = [f"{stage}-{precision}" for stage in range(4) for precision in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have left."""
    folder = tmp_path_factory.mktemp("sums")
    two_ranks.run("sum_ranks", folder, CASES)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_learn_from_what_one_would(folder: Path, case: str) -> None:
    norms, expected = json.loads((folder / f"{case}.json").read_text())
    assert norms == pytest.approx(expected, rel=1e-4 if case.endswith("fp32") else 0.02)
