"""The two commands of Slurm that a batch script of ours calls, over loopback addresses in place of nodes.

Slurm itself is not on the machines that run the tests. What is checked with these is the script: what it starts where,
what it does at the signal, and how it goes on. What Slurm does with its options is not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SRUN = """\
#!{python}
import os, signal, subprocess, sys

words, options = sys.argv[1:], {{}}
while words and words[0].startswith("--"):
    name, _, value = words.pop(0)[2:].partition("=")
    options[name] = value
nodes = os.environ["SLURM_JOB_NODELIST"].split(",")
if "nodelist" in options:
    nodes = [node for node in nodes if node == options["nodelist"]]
nodes = [node for node in nodes if node != options.get("exclude")][: int(options["nodes"])]
assert len(nodes) == int(options["ntasks"]), (nodes, options)
tasks = []
for number, node in enumerate(nodes):
    own = {{**os.environ, "SLURMD_NODENAME": node, "SLURM_PROCID": str(number)}}
    tasks.append(subprocess.Popen(words, env=own, start_new_session=True))


def end(signum, frame):
    for task in tasks:
        os.killpg(task.pid, signal.SIGTERM)


signal.signal(signal.SIGTERM, end)
codes = []
for task in tasks:
    codes.append(task.wait())
sys.exit(max(codes, default=0))
"""
SCONTROL = """\
#!{python}
import os, sys

if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(sys.argv[3].split(",")), flush=True)
elif sys.argv[1] == "requeue":
    open({requeued!r}, "a").write(sys.argv[2] + "\\n")
else:
    sys.exit("no such command here: " + " ".join(sys.argv[1:]))
"""


class Slurm:
    """A queue of one job on nodes of loopback."""

    def __init__(self, folder: Path, job_id: int, nodes: int) -> None:
        self._bin, self._requeued = folder / "bin", folder / "requeued"
        self._bin.mkdir()
        self.job_id, self.restarts = job_id, 0
        self.nodes = ",".join(f"127.0.0.{number + 2}" for number in range(nodes))
        self._count = nodes
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            path = self._bin / name
            path.write_text(text.format(python=sys.executable, requeued=str(self._requeued)))
            path.chmod(0o755)

    def start(self, script: Path, log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Run the script as Slurm runs it on the first node; a restart appends to its log."""
        own = {
            "PATH": os.pathsep.join([str(self._bin), environment["PATH"]]),
            "SLURM_JOB_ID": str(self.job_id),
            "SLURM_JOB_NODELIST": self.nodes,
            "SLURM_JOB_NUM_NODES": str(self._count),
            "SLURM_RESTART_COUNT": str(self.restarts),
        }
        self.restarts += 1
        with log.open("ab") as output:
            return subprocess.Popen(
                ["bash", str(script)],
                env={**environment, **own},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    @property
    def requeued(self) -> list[str]:
        """The jobs that were put back, in order."""
        return self._requeued.read_text().split() if self._requeued.exists() else []


def warn(process: subprocess.Popen[bytes]) -> None:
    """Send what `--signal=B:USR1@SECONDS` sends: to the batch shell alone."""
    process.send_signal(signal.SIGUSR1)
