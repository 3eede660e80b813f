"""The plan in one line, for `tandem jobs submit`, made by a process of its own: the job has begun, and goes first.

`python -m jobs.plan.at_submit SPEC [KEY.PATH=VALUE …]` is that process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cluster.home import home

PATIENCE_S = 10.0
"""So long the command waits for it; on an idle machine it takes five to eight seconds, most of them imports."""


def said(path: Path, overrides: Sequence[str], patience_s: float = PATIENCE_S) -> str:
    """Return what the job at `path` should take on this machine, or why that is not known. Ends after `patience_s`.

    Args:
        overrides: KEY.PATH=VALUE, as `--set` has them; the spec has been checked with them.
    """
    code = os.pathsep.join(filter(None, [_root(), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": code, "TANDEM_HOME": str(home().absolute())}
    command = [sys.executable, "-m", "jobs.plan.at_submit", str(path.absolute()), *overrides]
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=_root(),  # -m looks in the folder first: a `torch.py` of the user's is not for this
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=patience_s,
            check=True,
        )
    except subprocess.TimeoutExpired:
        return f"plan: not known within {patience_s:g} s; the job's log will say it"
    except (OSError, subprocess.SubprocessError) as error:  # an estimate is worth no job
        return f"plan: not known: {error}"
    return done.stdout.strip()


def made(path: Path, overrides: Sequence[str]) -> str:
    """Return the line, made here: imports torch and transformers."""
    from cluster import specfile
    from jobs import noise
    from jobs.spec import JobSpec

    noise.quiet()
    from jobs.plan import outlook, plan, settled

    try:
        spec = specfile.load(path, JobSpec, list(overrides))
        planned = settled.planned(spec, path.absolute().parent, plan.Asked(), lambda key: key, without_data=True)
        return outlook.line(plan.outlook(planned, 0, saves=spec.checkpoint.every_steps is not None))
    except Exception as error:  # an estimate is worth no job
        return f"plan: not known: {error}"


def _root() -> str:
    return str(Path(__file__).resolve().parents[2])


if __name__ == "__main__":
    with suppress(OSError):
        os.nice(19)
    print(made(Path(sys.argv[1]), sys.argv[2:]))
