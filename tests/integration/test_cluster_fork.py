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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import fork_client

ROOT = Path(__file__).parents[2]
HOOK = """
import gc, json, time
collects = []
def load():
    collects.append(gc.isenabled())
    time.sleep(0.2)
    try:
        import loose
    except ImportError:
        pass
def fail():
    raise RuntimeError("no")
def refuse():
    from cluster.cuda_internals import CannotFork
    with open("../refusals", "a") as file:
        file.write("1")
    raise CannotFork("no")
"""
SCRIPT = """
import gc, json, os, sys, time
answer = {
    "collects": [*getattr(sys.modules.get("hook"), "collects", []), gc.isenabled()],
    "seen": any(thing is sys.modules.get("hook") for thing in gc.get_objects()),
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
    assert first["collects"] == [False, True], "garbage is collected, but not while the server imports"
    assert not first["seen"], "what was imported is not looked through"
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


def test_where_nothing_can_be_forked_a_server_is_tried_once(session: Path) -> None:
    for name in ("one", "two"):
        found, errors = answer(start(session, name, hook="hook:refuse"))
        assert not found["loaded"]
    assert "cannot be forked here" in errors
    assert (session / "refusals").read_text() == "1"


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


RAYLET = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[2:]))"
"""What stands in a driver's ancestry where Ray's raylet does: it has the argument by which that is found."""
DRIVER = """
import signal, sys
from cluster.fork_client import shadow
if __name__ == "__main__":
    code = shadow("hook:load", "driver", {**__import__("os").environ, "MINE": "the server's"})
    if code is not None:
        print("shadow", code, flush=True)
        sys.exit(code)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever those before ignored
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    exec(open(sys.argv[1]).read())
"""


@contextmanager
def driven(session: Path, *arguments: str, raylet: bool = True) -> Iterator[subprocess.Popen[str]]:
    """Run a driver that wants to be forked, below what looks like a raylet."""
    (session / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-m", "driver", str(session / "script.py"), *arguments]
    above = [sys.executable, "-c", RAYLET, f"--raylet_socket_name={session}/sockets/raylet"] if raylet else []
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{session}", "MINE": "the driver's"}
    process = subprocess.Popen(
        [*above, *command], env=environment, cwd=session / "elsewhere", stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_driver_is_forked_and_its_exit_code_is_its_shadows(session: Path) -> None:
    with driven(session, "one") as process:
        out, _ = process.communicate(timeout=30)
    first, second = out.splitlines()
    found = json.loads(first)
    assert (found["loaded"], found["mine"], found["arguments"][-1]) == (True, "the driver's", "one")
    assert (found["folder"], found["first"]) == (str(session / "elsewhere"),) * 2
    assert psutil.Process(found["parent"]).environ()["MINE"] == "the server's"
    assert (second, process.returncode) == ("shadow 3", 3)


def test_a_driver_below_no_raylet_does_its_own_work(session: Path) -> None:
    with driven(session, raylet=False) as process:
        out, _ = process.communicate(timeout=30)
    assert not json.loads(out)["loaded"]
    assert process.returncode == 3


@pytest.mark.parametrize(("number", "ends_as"), [(signal.SIGTERM, 143), (signal.SIGINT, 1), (signal.SIGKILL, 247)])
def test_a_signal_to_the_shadow_reaches_the_driver_and_killing_it_kills_both(
    session: Path, number: signal.Signals, ends_as: int
) -> None:
    with driven(session, "wait") as process:
        assert process.stdout is not None
        forked = psutil.Process(json.loads(process.stdout.readline())["pid"])
        assert forked.name() == "driver"
        (shadow,) = psutil.Process(process.pid).children()
        shadow.send_signal(number)
        assert psutil.wait_procs([forked], timeout=10)[1] == []
        code = process.wait(10)
    assert code == ends_as  # 1: KeyboardInterrupt; 247: what the process above makes of -9


def test_a_driver_that_is_killed_is_told_to_its_shadow(session: Path) -> None:
    with driven(session, "wait") as process:
        assert process.stdout is not None
        psutil.Process(json.loads(process.stdout.readline())["pid"]).kill()
        assert process.wait(10) == 137


def test_a_driver_outlives_its_raylet_no_longer_than_its_shadow(session: Path) -> None:
    """Ray's supervisor ends what it started when its node goes; the server waits for that."""
    with driven(session, "wait") as process:
        assert process.stdout is not None
        forked = psutil.Process(json.loads(process.stdout.readline())["pid"])
        server = forked.parent()
        (shadow,) = psutil.Process(process.pid).children()
        process.kill()  # the raylet
        process.wait()
        time.sleep(3)
        assert forked.is_running()
        shadow.kill()
        assert psutil.wait_procs([forked, server], timeout=15)[1] == []
