"""Probes on nodes: an actor each that reserves nothing, pinned to its node, and gone at the end."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.doctor.probe import Probe
from cluster.doctor.wire import SECRET_BYTES
from cluster.ray_process_internals import HOOK_VARIABLE
from cluster.topology import Node

START_TIMEOUT_S = 90.0
"""A first process on a node may have to unpack the code and to import all of Ray, on a busy machine."""
CALL_TIMEOUT_S = 60.0


class Probes:
    """The nodes' probes, by node id. What one of them does not answer is kept in `errors`; it is asked no more."""

    def __init__(self, nodes: Sequence[Node], here: str | None = None) -> None:
        """Start them; none of them has begun when this returns.

        Args:
            here: id of this process's node, to be looked at by this process itself; None: it gets an actor too.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.secret = secrets.token_bytes(SECRET_BYTES)
        self.errors: dict[str, str] = {}
        self.where: dict[str, tuple[str, int]] = {}
        """Address and port of their listeners, once they have said it."""
        self._here = here
        self._probes: dict[str, Any] = {}
        # No hook of the job's: its processes import what workers need, and these need nothing of that.
        started = ray.remote(num_cpus=0, max_restarts=0, runtime_env={"env_vars": {HOOK_VARIABLE: ""}})(Probe)
        for node in nodes:
            arguments = (node.node_id, node.address, self.secret)
            if node.node_id == here:
                self._probes[here] = Probe(*arguments)
            else:
                there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
                self._probes[node.node_id] = started.options(scheduling_strategy=there).remote(*arguments)

    @property
    def answering(self) -> list[str]:
        """Ids of the nodes that have answered so far whatever they were asked."""
        return [node_id for node_id in self._probes if node_id not in self.errors]

    def ask(self, method: str, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> dict[str, Any]:
        """Ask all of them the same; return the answers of those that answer."""
        return self.ask_each(method, dict.fromkeys(self.answering, arguments), timeout_s=timeout_s)

    def ask_each(
        self, method: str, arguments: Mapping[str, Iterable[Any]], timeout_s: float = CALL_TIMEOUT_S
    ) -> dict[str, Any]:
        """Ask some of them, each by its own arguments; return the answers, and note who gave none."""
        said, failed = self.tried(method, arguments, timeout_s)
        self.errors.update(failed)
        return said

    def tried(
        self, method: str, arguments: Mapping[str, Iterable[Any]], timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Ask some of them for what may fail; return the answers, and why the others gave none."""
        import ray
        from ray.exceptions import RayError

        asked = {
            getattr(self._probes[node_id], method).remote(*given): node_id
            for node_id, given in arguments.items()
            if node_id != self._here
        }
        said: dict[str, Any] = {}
        failed: dict[str, str] = {}
        if self._here is not None and self._here in arguments:
            try:
                said[self._here] = getattr(self._probes[self._here], method)(*arguments[self._here])
            except (OSError, RuntimeError, ValueError) as error:
                failed[self._here] = str(error)
        ready = ray.wait([*asked], num_returns=len(asked), timeout=timeout_s)[0] if asked else []
        for reference, node_id in asked.items():
            try:
                if reference in ready:
                    said[node_id] = ray.get(reference)
                else:
                    failed[node_id] = f"no answer within {timeout_s:.0f} s"
            except RayError as error:
                failed[node_id] = _first_line(error)
        return said, failed

    def end(self) -> None:
        """End the probes, whatever they do."""
        import ray

        for node_id, probe in self._probes.items():
            if node_id == self._here:
                probe.close()
            else:
                ray.kill(probe)


def _first_line(error: Exception) -> str:
    """Return the reason of an error of Ray's: what the probe raised, not where."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(cause).__name__
