"""A file beside a spec with the name of one of Tandem's packages does not take that package's place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import daemons, shadows, shipping
from cluster.errors import UserError

ROOT = Path(__file__).parents[2]
BESIDE = (
    "jobs/__init__.py",
    "jobs/notes.py",
    "cluster.py",
    "serve/__init__.py",
    "tracking/data.json",
    "mine/jobs.py",
    "mine/__init__.py",
    "my_task.py",
)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    for name in (*BESIDE, "spec.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path / "spec.yaml"


def test_what_would_hide_ours_stays_at_home_and_everything_else_travels(spec: Path) -> None:
    with shipping.copied(spec.parent, also=spec) as folder:
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    kept = {"jobs/__init__.py", "cluster.py", "serve/__init__.py"}
    assert found == {*BESIDE, "spec.yaml"} - kept
    said = shadows.note(spec.parent)
    assert said is not None
    assert all(name in said for name in kept)


def test_python_finds_ours_behind_what_travels(spec: Path) -> None:
    code = "import jobs.driver, cluster.errors, serve.wire, tracking.manifest, mine.jobs; print(jobs.__file__)"
    with shipping.copied(spec.parent, also=spec) as folder:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "jobs" / "__init__.py")


def test_nothing_is_said_where_nothing_stays_at_home(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "notes.py").write_text("")
    assert shadows.note(tmp_path) is None
    assert shadows.note(ROOT) is None, "ours do not hide ours"


@pytest.mark.parametrize("target", ["jobs.notes:Task", "cluster:Task", "serve:Task"])
def test_a_task_in_a_module_with_such_a_name_is_refused(spec: Path, target: str) -> None:
    with pytest.raises(UserError, match=r"the name of one of Tandem's own packages.*; rename "):
        shadows.check_own_module(target, spec.parent)


@pytest.mark.parametrize("target", ["causal-lm", "my_task:Task", "mine.jobs:Task", "jobs.tasks.causal_lm:CausalLm"])
def test_other_tasks_are_not(spec: Path, target: str) -> None:
    shadows.check_own_module(target, spec.parent)


def test_a_driver_that_was_sent_otherwise_says_what_hides_ours(spec: Path) -> None:
    (spec.parent / "jobs" / "__init__.py").unlink()  # with it, Python itself finds no `jobs.driver`
    command = [sys.executable, "-m", "jobs.driver", "spec.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=spec.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "'cluster' is not found, or cluster.py or cluster/__init__.py in the job's folder hides it" in done.stdout


def test_daemons_get_absolute_import_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"lib::{ROOT}")
    assert daemons.environment("x", tmp_path / "token")["PYTHONPATH"] == f"{tmp_path}/lib:{ROOT}"
