"""Processes that are forked look like those that were started."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import fork_client

ROOT = Path(__file__).parents[2]
HOOK = """
import json, time
def load():
    time.sleep(0.2)
    try:
        import loose
    except ImportError:
        pass
def fail():
    raise RuntimeError("no")
"""
SCRIPT = """
import json, os, sys, time
answer = {
    "arguments": sys.argv, "folder": os.getcwd(), "mine": os.environ.get("MINE"),
    "parent": os.getppid(), "pid": os.getpid(),
    "loaded": "hook" in sys.modules, "loose": "loose" in sys.modules,
    "session": os.getsid(0) == os.getpid(), "first": sys.path[0],
}
print(json.dumps(answer), flush=True)
print("to the errors", file=sys.stderr)
if "wait" in sys.argv:
    time.sleep(60)
sys.exit(3)
"""


@pytest.fixture
def session() -> Iterator[Path]:
    """A folder like that of a Ray session, with a hook and a script; afterwards its servers are ended."""
    folder = Path(tempfile.mkdtemp(prefix="tf-", dir="/tmp"))
    for name in ("sockets", "logs", "elsewhere"):
        (folder / name).mkdir()
    (folder / "hook.py").write_text(HOOK)
    (folder / "script.py").write_text(SCRIPT)
    yield folder
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in process.info["cmdline"] or []):
            process.kill()
    shutil.rmtree(folder)


def start(session: Path, *arguments: str, hook: str = "hook:load", **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-S", "-m", "cluster.fork_client", hook, str(session / "script.py")]
    return subprocess.Popen(
        [*command, f"--raylet-name={session}/sockets/raylet", *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{session}", "RAY_RAYLET_PID": str(os.getpid()), **environment},
        cwd=session / "elsewhere",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    out, err = process.communicate(timeout=30)
    return json.loads(out), err


def test_a_forked_process_is_the_one_that_was_asked_for(session: Path) -> None:
    first, errors = answer(start(session, "one", MINE="1"))
    assert first["arguments"][0] == str(session / "script.py")
    assert first["arguments"][-1] == "one"
    assert (first["folder"], first["mine"], first["loaded"]) == (str(session / "elsewhere"), "1", True)
    assert first["first"] == str(session)
    assert first["session"], "signals to its group reach nobody else"
    assert errors == "to the errors\n"
    second, _ = answer(start(session, "two", MINE="2"))
    assert (second["mine"], second["arguments"][-1]) == ("2", "two")
    assert second["parent"] == first["parent"], "one server"
    assert psutil.Process(second["parent"]).cmdline()[2] == "cluster.fork_server"


def test_the_command_finds_a_python_where_the_drivers_is_missing(
    session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for executable in (sys.executable, "/no/such folder/python"):
        monkeypatch.setattr(sys, "executable", executable)
        script = shlex.quote(str(session / "script.py"))
        command = f"exec {fork_client.py_executable('hook:load')} {script} --raylet-name={session}/sockets/raylet"
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{session}", "RAY_RAYLET_PID": str(os.getpid())}
        done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
        assert json.loads(done.stdout)["loaded"], done.stderr


def test_a_module_in_the_first_clients_folder_reaches_nobody_else(session: Path) -> None:
    (session / "elsewhere" / "loose.py").write_text("")
    found, _ = answer(start(session))
    assert found["loaded"]
    assert not found["loose"]


def test_several_at_once_start_one_server(session: Path) -> None:
    processes = [start(session, str(number)) for number in range(6)]
    assert len({answer(process)[0]["parent"] for process in processes}) == 1


def test_what_the_imports_depend_on_has_a_server_of_its_own(session: Path) -> None:
    first, _ = answer(start(session, DS_ACCELERATOR="cpu"))
    second, _ = answer(start(session, DS_ACCELERATOR="cuda"))
    assert first["parent"] != second["parent"]


@pytest.mark.parametrize("broken", ["hook", "folder", "argument"])
def test_without_a_server_it_becomes_a_plain_python(session: Path, broken: str) -> None:
    if broken == "folder":
        shutil.rmtree(session / "sockets")
    process = start(session, "one", hook="hook:fail" if broken == "hook" else "hook:load")
    if broken == "argument":
        process.kill()
        process.communicate()
        command = [sys.executable, "-S", "-m", "cluster.fork_client", "hook:load", str(session / "script.py")]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    found, errors = answer(process)
    assert not found["loaded"]
    assert process.returncode == 3
    assert "this process imports by itself" in errors


def test_a_server_that_was_killed_is_replaced(session: Path) -> None:
    first, _ = answer(start(session))
    psutil.Process(first["parent"]).kill()
    second, _ = answer(start(session))
    assert second["loaded"]
    assert second["parent"] != first["parent"]


def test_a_signal_reaches_the_forked_process_and_its_end_the_client(session: Path) -> None:
    process = start(session, "wait")
    assert process.stdout is not None
    forked = psutil.Process(json.loads(process.stdout.readline())["pid"])
    process.send_signal(signal.SIGTERM)
    assert psutil.wait_procs([forked], timeout=10)[1] == []
    process.communicate(timeout=10)


def test_a_server_ends_with_its_raylet(session: Path) -> None:
    raylet = subprocess.Popen(["sleep", "60"])
    found, _ = answer(start(session, RAY_RAYLET_PID=str(raylet.pid)))
    server = psutil.Process(found["parent"])
    raylet.kill()
    raylet.wait()
    deadline = time.monotonic() + 15
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
