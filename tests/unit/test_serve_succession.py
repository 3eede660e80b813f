"""Which of the running actors `serve up` keeps, has succeeded or ends; and the digest of the code by which it tells."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from serve.deploy.succession import Generation, Steps, code_version, steps

ONE, TWO = "state:x", "state:x#2"
NEW, OLD = Generation("new"), Generation("old")
UNKNOWN = Generation("")
MOVED = Generation("old", moved=True)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ({}, Steps(None, None, ())),
        ({ONE: NEW}, Steps(ONE, None, ())),
        ({TWO: NEW}, Steps(TWO, None, ())),
        ({ONE: OLD}, Steps(None, ONE, ())),
        ({TWO: UNKNOWN}, Steps(None, TWO, ())),
        ({ONE: MOVED, TWO: NEW}, Steps(TWO, None, (ONE,))),  # an `up` ended before it ended the first
        ({ONE: OLD, TWO: NEW}, Steps(TWO, ONE, ())),  # or before the second took over
        ({ONE: MOVED, TWO: OLD}, Steps(None, TWO, (ONE,))),
        ({ONE: OLD, TWO: UNKNOWN}, Steps(None, ONE, (TWO,))),
    ],
)
def test_one_actor_of_the_code_wanted_is_left(found: dict[str, Generation], wanted: Steps) -> None:
    assert steps(found, "new") == wanted


def test_the_digest_is_that_of_the_code(tmp_path: Path) -> None:
    import shutil

    root = Path(__file__).parents[2]
    for package in ("cluster", "serve"):
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))

    def digest() -> str:
        command = [sys.executable, "-c", "from serve.deploy.succession import code_version; print(code_version())"]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    assert digest() == code_version()
    with (tmp_path / "serve" / "keys" / "limiter.py").open("a") as file:
        file.write("# another version\n")
    assert digest() != code_version()
