"""What becomes a worker does what Ray's own script does, and leaves to it what it does not know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from cluster import daemons, setup_worker

SHOWS = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), {name: os.environ.get(name) for name in ("A", "B", "C", "FROM", "PATH")}]))
"""


def run(script: str, folder: Path, context: dict[str, object] | None) -> str:
    """Run a worker that shows its arguments and variables; return what it prints."""
    worker = folder / "default worker.py"
    worker.write_text(SHOWS)
    told = [] if context is None else [f"--serialized-runtime-env-context={json.dumps(context)}"]
    arguments = [str(worker), "--name=it's $A", "--raylet-name=/a b", *told, "--language=PYTHON", "--last"]
    environment = {**os.environ, "FROM": "here", "B": "before"}
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "context",
    [
        None,
        {"env_vars": {"A": "${FROM}, $B, ${NOTHING}.", "B": "after", "C": "$B"}, "py_executable": None},
        {"py_executable": f'"$(command -v {sys.executable} || command -v python3)" -S', "env_vars": {}},
        {"command_prefix": ["cd", "/", "&&", "A=prefixed"], "env_vars": {"B": "after"}},
    ],
)
def test_the_worker_is_what_it_is_by_rays_own_script(context: dict[str, object] | None, tmp_path: Path) -> None:
    ray = util.find_spec("ray")
    assert ray is not None
    own = Path(str(ray.origin)).parent / "_private" / "workers" / "setup_worker.py"
    found = run(str(daemons.SETUP_WORKER), tmp_path, context)
    assert json.loads(found)[0][1:] == ["--name=it's $A", "--raylet-name=/a b", "--last"]
    assert found == run(str(own), tmp_path, context)


@pytest.mark.parametrize(
    "arguments",
    [
        ["w.py", "--language=JAVA"],
        ["w.py"],
        ["w.py", "--language", "PYTHON"],
        ["w.py", "--language=PYTHON", '--serialized-runtime-env-context={"newer": 1}'],
        ["w.py", "--language=PYTHON", "--serialized-runtime-env-context", "{}"],
        ["w.py", "--language=PYTHON", "--serialized-runtime-env-context={"],
        ["w.py", "--language=PYTHON", '--serialized-runtime-env-context={"override_worker_entrypoint": "x.py"}'],
    ],
)
def test_what_is_no_plain_python_worker_is_left_to_ray(arguments: list[str]) -> None:
    assert setup_worker.line_of(arguments) is None


def test_nothing_beside_it_has_the_name_of_what_it_imports() -> None:
    """Its folder comes first where Python looks until its imports are made."""
    beside = {path.stem for path in daemons.SETUP_WORKER.parent.iterdir()}
    assert beside & sys.stdlib_module_names == set()
    assert daemons.SETUP_WORKER.is_file()


def test_a_cluster_runs_a_copy_of_its_own(tmp_path: Path) -> None:
    command = daemons.node_command("127.0.0.1:1", "127.0.0.2", tmp_path / "ray", 1, 0)
    assert command[3] == str(tmp_path / "ray" / daemons.SETUP_WORKER.name)
    assert Path(command[3]).read_bytes() == daemons.SETUP_WORKER.read_bytes()
    assert [path.name for path in (tmp_path / "ray").iterdir()] == [daemons.SETUP_WORKER.name]
