"""What of a job may be forked: nothing that has an environment of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.driver import warm

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("described", "ours"),
    [
        ({"working_dir": "gcs://a.zip", "py_modules": [], "excludes": [], "env_vars": {"TANDEM_HOME": "/a"}}, True),
        ({"env_vars": {"MLFLOW_TRACKING_URI": "http://a", "RAY_JOB_STOP_WAIT_TIME_S": "3"}}, True),
        ({"env_vars": {"HF_HOME": "/a"}}, False),
        ({"env_vars": {"TANDEM_HOME": "/a", "OMP_NUM_THREADS": "4"}}, False),
        ({"pip": ["torch==2.1"]}, False),
        ({"py_executable": "python3.13"}, False),
        ({}, True),
        (None, True),
    ],
)
def test_only_tandems_own_environment_is_forked(described, ours):
    assert warm.is_ours(json.dumps({"runtime_env": described, "metadata": {"job_submission_id": "a"}})) is ours


@pytest.mark.parametrize(("marker", "ours"), [("", True), ("{", False), ("[]", False)])
def test_what_ray_left_may_be_nothing_or_nonsense(marker, ours):
    assert warm.is_ours(marker) is ours


def test_the_shadow_of_a_driver_and_the_guard_import_no_spec():
    """Half a second of imports before a job is even begun, and of a process beside it."""
    code = "import sys, jobs.driver.{}; print({{'jobs.spec', 'numpy', 'ray', 'torch'}} & sys.modules.keys())"
    for module in ("warm", "guard"):
        run = [sys.executable, "-c", code.format(module)]
        assert subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "set()\n"
