"""SlurmSpec: what `tandem cluster sbatch` reads. Which allocation a job gets, and what its nodes share."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from cluster.redact import is_secret
from cluster.strict import Strict

_TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):(\d{2}):(\d{2})|(\d+)")


def seconds(text: str) -> int:
    """Return a limit of time as Slurm writes it, `DAYS-HH:MM:SS`, `HH:MM:SS` or minutes, in seconds.

    Raises:
        ValueError: it is none.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError("takes a limit such as 04:00:00, 2-00:00:00 or 90 (minutes); in quotes, for YAML")
    if found[5]:
        return 60 * int(found[5])
    days, hours, minutes, rest = (int(part or 0) for part in found.groups()[:4])
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _time(value: str) -> str:
    if seconds(value) <= 0:
        raise ValueError("takes a limit above 0")
    return value


Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:+&|=*\[\]()-]+$")]
Absolute = Annotated[str, Field(pattern=r"^/[^\s'\"$`\\]*$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class SlurmSpec(Strict):
    """An allocation, and what is on its nodes."""

    nodes: int = Field(1, ge=1, le=10_000)
    """Ray's head is on the first one, which computes too."""
    cpus_per_node: int = Field(8, ge=1, le=10_000)
    """CPUs of each, for Slurm and for Ray."""
    gpus_per_node: int = Field(0, ge=0, le=64)
    """GPUs of each, for Slurm and for Ray."""
    memory_per_node: Annotated[str, Field(pattern=r"^[0-9]+[KMGT]?$")] | None = None
    """Such as 64G; the partition's default when left out."""
    time: Annotated[str, AfterValidator(_time)] = "04:00:00"
    """The limit of one allocation: the job saves before it, and goes on in the next."""
    partition: Word | None = None
    """Slurm's `--partition`."""
    account: Word | None = None
    """Slurm's `--account`."""
    qos: Word | None = None
    """Slurm's `--qos`."""
    constraint: Word | None = None
    """Features of the nodes."""
    home: Absolute
    """A folder that all nodes share: TANDEM_HOME, with data, checkpoints and models, and the scripts' logs."""
    mlflow_uri: Annotated[str, Field(pattern=r"^https?://[^\s@'\"]+$")]
    """Your MLflow server; `python -m tracking.server --root DIR --host 0.0.0.0` is one."""
    setup: list[str] = Field(default_factory=list)
    """Lines of shell for every node before anything else: `module load cuda`, `source /shared/venv/bin/activate`."""
    env: dict[Variable, str] = Field(default_factory=dict)
    """Further variables on every node; none that is a secret, which belong into `setup` as `source FILE`."""
    save_s: int = Field(120, ge=10, le=7_200)
    """So long before the limit the job is asked to save and stop: above what its checkpoint takes."""
    start_timeout_s: int = Field(300, ge=10, le=7_200)
    """How long all nodes may take to be there."""
    requeue: bool = True
    """Whether it goes on in another allocation after the limit, or after a node was lost."""

    @model_validator(mode="after")
    def _can_save(self) -> SlurmSpec:
        if self.save_s >= seconds(self.time) / 2:
            raise ValueError(
                f"save_s, {self.save_s} s, is half of time, {self.time}, or more: nothing would be learned in it"
            )
        for name in self.env:
            if is_secret(name):
                raise ValueError(
                    f"env.{name} is a secret in a file that others read: put `source FILE` into setup, with a file of "
                    "mode 600"
                )
        return self
