"""How far the cluster can grow by itself: the nodes that its autoscaler may start, as far as this process is told.

Ray 2.60 tells nobody what its autoscaler may start, so whoever starts the head says it to what runs there:
TANDEM_NODE_TYPES is the path of the launcher's file (`ray-cluster.yaml` names its copy on the head), or JSON of the
same shape: {"gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 4}} (`tandem cluster manifests` writes it).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.topology import Node

VARIABLE = "TANDEM_NODE_TYPES"


def at_full_size(nodes: Iterable[Node], environment: Mapping[str, str] = os.environ) -> list[Node]:
    """Return the nodes of the cluster once it has grown as far as it can; none where it cannot, or nobody tells.

    Raises:
        UserError: the variable is set and cannot be read: a job would be refused for what the cluster could give.
    """
    told = environment.get(VARIABLE)
    if not told:
        return []
    try:
        config = _read(told)
        types = config.get("available_node_types", config)
        most, head = config.get("max_workers"), config.get("head_node_type")
        grown = [node for node in nodes if node.alive and node.is_head]
        for name, kind in types.items():
            if name != head:
                count = int(kind["max_workers"] if kind.get("max_workers") is not None else most or 0)
                grown += _nodes(name, kind.get("resources") or {}, count if most is None else min(count, int(most)))
        return grown
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{VARIABLE}={told}: {error!r}; it names the launcher's file, or is JSON such as "
            '{"gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 4}}'
        ) from None


def _read(told: str) -> dict[str, Any]:
    if told.lstrip().startswith("{"):
        found = json.loads(told)
    else:
        import yaml

        try:
            found = yaml.safe_load(Path(told).expanduser().read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from None
    if not isinstance(found, dict):
        raise ValueError("takes a mapping")
    return found


def _nodes(name: str, resources: Mapping[str, Any], count: int) -> list[Node]:
    cpus, gpus = float(resources.get("CPU", 0)), float(resources.get("GPU", 0))
    return [Node(f"{name}-{number}", "", True, False, cpus, cpus, gpus, gpus) for number in range(count)]
