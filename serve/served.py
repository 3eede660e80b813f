"""What was brought up from here, as a file in Tandem's home: its address, its spec, and the cluster that it was on.

The file outlives the cluster. After the head has died, it says what was served, where, and how to bring it back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cluster import connect, record
from cluster.errors import UserError
from cluster.home import home

JOB = "TANDEM_SERVE_JOB"
"""The variable that tells a deploy job its own id: another one that waits for it names it."""
PORT_BEFORE = "TANDEM_SERVE_PORT_BEFORE"
"""The variable with the port of an endpoint that its cluster's death has ended: clients still know it."""


ADDRESS = "address:"
"""What stands before the address of a cluster that is not the local one."""
Place = Literal["here", "gone", "elsewhere"]
"""Gone: with the local cluster, another one runs now. Elsewhere: on a cluster that this process does not talk to."""


@dataclass(frozen=True)
class Served:
    """What `serve up` made last."""

    name: str
    endpoint: str
    models: tuple[str, ...] = ()
    spec: str = ""
    """The spec's file; empty where there was none."""
    cluster: str = ""
    """Id of the local cluster, or the address of another one; files of earlier versions have nothing for the latter."""
    place: Place = "here"
    certificate: str | None = None
    """The file of its certificate, on the nodes where it listens; None for http."""

    @property
    def is_current(self) -> bool:
        """Whether the cluster that it was on is the one this process talks to."""
        return self.place == "here"

    @property
    def sentence(self) -> str:
        """What became of it where nothing is served, and how to bring it back."""
        up = f"`tandem serve up {self.spec}`" if self.spec else "`tandem serve up SPEC`"
        what = f"{', '.join(self.models)} at {self.endpoint}"
        if self.place == "elsewhere":
            at = f", {self.cluster.removeprefix(ADDRESS)}" if self.cluster.startswith(ADDRESS) else ""
            return f"{what} was brought up on another cluster{at}"
        ended = (
            "ended with the cluster" if self.place == "gone" else "was stopped from elsewhere, or Ray Serve has ended"
        )
        return f"{what} {ended}: {up} serves it again"


def place(cluster: str, here: str, is_local: bool) -> Place:
    """Return where what was brought up on `cluster` is, as seen from the cluster `here`. Pure.

    Args:
        cluster: the id of a local cluster, or the address of another one, or nothing (earlier versions).
        here: the same of the cluster that this process talks to.
        is_local: whether that is the local one.
    """
    if cluster == here or not (cluster or is_local):
        return "here"
    is_address = cluster.startswith(ADDRESS) or not cluster
    return "gone" if is_local and not is_address else "elsewhere"


def remember(outcome: Mapping[str, Any], spec: Path | None) -> None:
    """Write what `serve up` made, so that readers see the old or the new file.

    Of two at once, the one stays that deployed last, whichever gets here first.
    """
    home().mkdir(parents=True, exist_ok=True)
    kept = {**outcome, "spec": str(spec.absolute()) if spec else "", "cluster": _cluster()[0]}
    before = _written()
    if (
        before
        and before.get("cluster") == kept["cluster"]
        and before.get("deployed_at", 0) > kept.get("deployed_at", 0)
    ):
        return
    partial = home() / f".serve.json.{os.getpid()}.partial"
    partial.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    partial.replace(_path())


def remembered() -> Served | None:
    """Return what was brought up last from here, whether or not it still is.

    Raises UserError for a file that a machine's sudden end has left empty or cut.
    """
    written = _written()
    if written is None:
        return None
    if not written:
        raise UserError(f"{_path()} cannot be read: remove it; `tandem serve up SPEC` writes it anew")
    cluster = written.get("cluster", "")
    models = tuple(written["models"])
    where = place(cluster, *_cluster())
    return Served(
        written["name"],
        written["endpoint"],
        models,
        written.get("spec", ""),
        cluster,
        where,
        written.get("certificate"),
    )


def name() -> str | None:
    """Return the name of the endpoint that was brought up last on this cluster, as far as it is known."""
    try:
        found = remembered()
    except UserError:
        return None
    return found.name if found and found.is_current else None


def _written() -> dict[str, Any] | None:
    """Return what the file says; None: there is none; empty: it cannot be read."""
    try:
        written = json.loads(_path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    whole = isinstance(written, dict) and {"name", "endpoint", "models"} <= written.keys()
    return written if whole else {}


def forget() -> None:
    """Remove the file: nothing is served any more, and that is meant."""
    _path().unlink(missing_ok=True)


def environment() -> dict[str, str]:
    """Return what tells a new endpoint which port the lost one had; empty where none was lost."""
    try:
        lost = remembered()
    except UserError:  # it is about to be written anew
        lost = None
    port = urlsplit(lost.endpoint).port if lost and lost.place == "gone" else None
    return {PORT_BEFORE: str(port)} if port else {}


def _path() -> Path:
    return home() / "serve.json"


def _cluster() -> tuple[str, bool]:
    """Return the id of the local cluster or the address of another one, and whether it is the local one."""
    found, local = connect.connection(), record.read()
    if local is not None and found.is_local:
        return local.id, True
    return ADDRESS + found.ray_address, False
