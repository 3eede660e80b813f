"""What was brought up from here, as a file in Tandem's home: its address, its spec, and the cluster that it was on.

The file outlives the cluster. After the head has died, it says what was served, where, and how to bring it back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster import connect, record
from cluster.errors import UserError
from cluster.home import home

JOB = "TANDEM_SERVE_JOB"
"""The variable that tells a deploy job its own id: another one that waits for it names it."""
PORT_BEFORE = "TANDEM_SERVE_PORT_BEFORE"
"""The variable with the port of an endpoint that its cluster's death has ended: clients still know it."""


@dataclass(frozen=True)
class Served:
    """What `serve up` made last."""

    name: str
    endpoint: str
    models: tuple[str, ...] = ()
    spec: str = ""
    """The spec's file; empty where there was none."""
    cluster: str = ""
    """Id of the local cluster; empty for another one."""
    is_current: bool = True
    """False when the local cluster that it was on is gone."""

    @property
    def sentence(self) -> str:
        """What was lost with the cluster, and how to bring it back."""
        up = f"`tandem serve up {self.spec}`" if self.spec else "`tandem serve up SPEC`"
        return f"{', '.join(self.models)} at {self.endpoint} ended with the cluster: {up} serves it again"


def remember(outcome: Mapping[str, Any], spec: Path | None) -> None:
    """Write what `serve up` made, so that readers see the old or the new file."""
    home().mkdir(parents=True, exist_ok=True)
    kept = {**outcome, "spec": str(spec.absolute()) if spec else "", "cluster": _local_cluster()}
    partial = home() / ".serve.json.partial"
    partial.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    partial.replace(_path())


def remembered() -> Served | None:
    """Return what was brought up last from here, whether or not it still is.

    Raises UserError for a file that a machine's sudden end has left empty or cut.
    """
    try:
        written = json.loads(_path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        written = None
    if not isinstance(written, dict) or not {"name", "endpoint", "models"} <= written.keys():
        raise UserError(f"{_path()} cannot be read: remove it; `tandem serve up SPEC` writes it anew")
    cluster = written.get("cluster", "")
    return Served(
        written["name"],
        written["endpoint"],
        tuple(written["models"]),
        written.get("spec", ""),
        cluster,
        is_current=not cluster or cluster == _local_cluster(),
    )


def forget() -> None:
    """Remove the file: nothing is served any more, and that is meant."""
    _path().unlink(missing_ok=True)


def environment() -> dict[str, str]:
    """Return what tells a new endpoint which port the lost one had; empty where none was lost."""
    try:
        lost = remembered()
    except UserError:  # it is about to be written anew
        lost = None
    port = urlsplit(lost.endpoint).port if lost and not lost.is_current else None
    return {PORT_BEFORE: str(port)} if port else {}


def _path() -> Path:
    return home() / "serve.json"


def _local_cluster() -> str:
    """Return the id of the local cluster, if that is the one this process talks to."""
    local = record.read()
    return local.id if local is not None and connect.connection().is_local else ""
