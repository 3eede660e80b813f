"""The doctor's quick part, before a job that spans nodes: in a thread, beside what the job's driver does anyway."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from cluster import topology
from cluster.doctor import examine, judge
from cluster.doctor.asking import Probes
from cluster.doctor.facts import Facts, Finding
from cluster.doctor.table import sentence
from cluster.errors import UserError

START_TIMEOUT_S = 30.0
"""A node that has not answered by then is said, and the job goes on: its workers may take as long to start."""
REFUSED = ("versions", "names", "ports")
"""By such errors a run would fail, or compute something else on some nodes; of the others the job's log tells."""
TRIES = 3
"""So often a port is tried before it counts as not reached."""


class QuickLook:
    """Look at some nodes of the cluster to which this process is connected, from its beginning on."""

    def __init__(self, node_ids: Iterable[str]) -> None:
        """Begin; fewer than two nodes are not looked at."""
        self._node_ids = set(node_ids)
        self._facts: Facts | None = None
        self._thread = threading.Thread(target=self._look, daemon=True)
        if len(self._node_ids) > 1:
            self._thread.start()

    def settle(self) -> list[str]:
        """Wait for the end, and return what is to be said; once, then nothing.

        Raises:
            UserError: the nodes do not fit together.
        """
        if self._thread.ident is None:
            return []
        self._thread.join()
        facts, self._facts = self._facts, None
        if facts is None:
            return []
        refused, said = divided(judge.verdicts(facts))
        if refused:
            raise UserError("\n".join([*refused, "`tandem doctor` tells more"]))
        return said

    def _look(self) -> None:
        import ray
        from ray.exceptions import RayError

        try:
            here = ray.get_runtime_context().get_node_id()
            nodes = [node for node in topology.own_nodes() if node.alive and node.node_id in self._node_ids]
            probes = Probes(nodes, here if here in self._node_ids else None)
            try:
                self._facts = examine.first_facts(nodes, probes, True, START_TIMEOUT_S, TRIES)
            finally:
                probes.end()
        except (RayError, OSError) as error:  # the job will meet what this met, and knows how to go on
            print(f"the nodes were not looked at before the start: {error}", flush=True)


def divided(findings: Iterable[Finding]) -> tuple[list[str], list[str]]:
    """Return what a job is refused by, and what is only said. Pure."""
    refused: list[str] = []
    said: list[str] = []
    for finding in findings:
        is_refused = finding.severity == "error" and finding.kind in REFUSED
        (refused if is_refused else said).append(sentence(finding))
    return refused, said
