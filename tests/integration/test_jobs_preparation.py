"""A preparation that was killed goes on from the files that it had finished."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jobs.data.ranges import Sizes
from jobs.data.unfinished import RECORDS
from tests.support.slow_preparation import HERE, ROOT, environment, lay_out, made


@pytest.fixture
def base(tmp_path, monkeypatch):
    lay_out(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "own_slow", raising=False)
    return tmp_path


def killed(base: Path, at_least: int) -> Path:
    """Kill a preparation by processes once so many of its files are finished; return its folder."""
    command = [sys.executable, "-m", "tests.support.slow_preparation", str(base), "killed"]
    process = subprocess.Popen(command, env={**environment(base), "SLOW_S": "0.1"}, cwd=ROOT)
    below: list[psutil.Process] = []
    try:
        until = time.monotonic() + 100
        while len(_finished(base)) < at_least:
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < until
            time.sleep(0.02)
        below = psutil.Process(process.pid).children(recursive=True)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(below) >= 2, "others worked for it"
    _, left = psutil.wait_procs(below, timeout=20)
    assert left == [], "what worked for it has ended with it"
    (folder,) = (base / "killed" / "data").glob("*.partial")
    return folder


def _finished(base: Path) -> list[Path]:
    return sorted((base / "killed" / "data").glob(f"*.partial/{RECORDS}/[!.]*.json"))


def _written(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_a_killed_preparation_goes_on_from_the_files_it_finished(base, capsys):
    folder = killed(base, at_least=6)
    shutil.copytree(base / "killed", base / "others")
    there = {path.stem: _written(folder / path.stem) for path in _finished(base)}
    torn, missing, *kept = there
    (folder / torn).write_bytes((folder / torn).read_bytes()[:-8] + b"damaged!")
    (folder / missing).unlink()
    done, clean = made(base, "killed", HERE), made(base, "clean", HERE)
    assert done.rows == clean.rows
    assert f"{len(kept)} files of rows were there" in capsys.readouterr().out
    whole = {path.name: _written(path) for path in Path(done.directory).iterdir()}
    assert [name for name, before in there.items() if whole[name] == before] == kept
    assert whole.keys() == {path.name for path in Path(clean.directory).iterdir()}
    assert [path.name for path in (base / "killed" / "data").iterdir()] == [Path(done.directory).name]
    other = Sizes(5_000, 1 << 40)
    assert made(base, "others", other).rows == made(base, "anew", other).rows
    assert "were there" not in capsys.readouterr().out, "other ranges take over nothing"
