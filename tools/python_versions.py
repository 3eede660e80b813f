"""Install and test Tandem on every Python that `pyproject.toml` names: python tools/python_versions.py [3.12 …]

Each version gets a fresh virtual environment in a temporary folder, then `tools/install`, ruff and mypy, the pure
tests, and a job of a few steps on a cluster of its own. One line a version says how it went; any failure exits with 1.
The interpreters are looked for on the PATH, then in pyenv. A version takes three minutes on two cores, and longer where
CUDA's libraries are downloaded with torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 1800


def named_versions(pyproject: str) -> list[str]:
    """Return the versions, "3.10" and so on, that the classifiers of a `pyproject.toml` name."""
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', pyproject)


def find_interpreter(version: str) -> str | None:
    """Return the path of a Python of this version that runs, or None."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    installed = [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python"))]
    candidates = [shutil.which(f"python{version}"), *installed]
    return next((path for path in candidates if path and _runs(path)), None)


def steps(folder: Path) -> dict[str, list[list[str]]]:
    """Return what is done with one version, by name: commands for a clone with its environment in `folder`/venv."""
    binaries = folder / "venv" / "bin"
    python, tandem = str(binaries / "python"), str(binaries / "tandem")
    job = ["jobs", "submit", "jobs/specs/digits.yaml", "--follow", "--set", "training.epochs=0.25"]
    return {
        "install": [["tools/install", str(folder / "venv")]],
        "check": [[str(binaries / "ruff"), "check", "."], [str(binaries / "mypy"), f"--cache-dir={folder / 'mypy'}"]],
        "pure tests": [[python, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "tests/unit"]],
        "job": [[tandem, "cluster", "up"], [tandem, *job]],
    }


def try_version(version: str) -> str | None:
    """Print how the steps went on one version; return what failed, or None."""
    interpreter = find_interpreter(version)
    if interpreter is None:
        print(f"Python {version}: not found on the PATH or in pyenv")
        return "not found"
    # Short: the sockets of Ray lie in the folder.
    folder = Path(tempfile.mkdtemp(prefix="tp-", dir="/tmp"))
    own = {"PYTHON": interpreter, "TANDEM_HOME": str(folder / "home"), "TANDEM_CACHE": str(folder / "cache")}
    others = ("PYTHONPATH", "VIRTUAL_ENV", "RAY_ADDRESS", "MLFLOW_TRACKING_URI")
    environment = {name: value for name, value in os.environ.items() if name not in others} | own
    started = time.monotonic()
    try:
        failed = _first_failure(folder, environment)
    finally:
        _cluster_down(folder, environment)
    seconds = time.monotonic() - started
    print(
        f"Python {version}: {failed or 'installs, passes the check and the pure tests, trains'} · {seconds:.0f} s",
        flush=True,
    )
    if failed is None:
        shutil.rmtree(folder, ignore_errors=True)
    return failed


def _first_failure(folder: Path, environment: dict[str, str]) -> str | None:
    log = folder / "log"
    for name, commands in steps(folder).items():
        for command in commands:
            with log.open("a") as out:
                out.write(f"$ {' '.join(command)}\n")
                out.flush()
                done = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, timeout=TIMEOUT_S
                )
            if done.returncode:
                return f"{name} FAILED, see {log}"
    return None


def _cluster_down(folder: Path, environment: dict[str, str]) -> None:
    if (folder / "home").exists():
        command = [str(folder / "venv" / "bin" / "tandem"), "cluster", "down"]
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=TIMEOUT_S)


def _runs(interpreter: str) -> bool:
    return subprocess.run([interpreter, "-c", ""], capture_output=True).returncode == 0


def main(versions: list[str]) -> int:
    """Try `versions`, or all that are named; return the exit code."""
    failures = [try_version(version) for version in versions or named_versions((ROOT / "pyproject.toml").read_text())]
    return int(any(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
