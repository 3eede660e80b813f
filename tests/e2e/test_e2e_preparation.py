"""Tasks of a cluster prepare the rows that one process prepares."""

import subprocess
import sys

import pytest

from tests.support.slow_preparation import HERE, ROOT, environment, lay_out, made


@pytest.mark.usefixtures("cluster")
def test_tasks_of_a_cluster_give_what_one_process_gives(tmp_path, monkeypatch):
    lay_out(tmp_path)
    command = [sys.executable, "-m", "tests.support.slow_preparation", str(tmp_path), "cluster", "cluster"]
    found = subprocess.run(command, env=environment(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert found.stdout.split() == ["cluster", made(tmp_path, "here", HERE).rows]
