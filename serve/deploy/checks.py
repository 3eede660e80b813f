"""What `serve up` looks at before anything is deployed: room, keys, and what is worth a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from cluster import devices, growth
from cluster.errors import UserError
from cluster.precision import decide
from cluster.topology import Node
from serve.deploy import room
from serve.deploy.names import model_app
from serve.keys.store import Store
from serve.spec import ModelServeSpec, ServeSpec


def refuse_what_never_fits(spec: ServeSpec, nodes: Sequence[Node]) -> None:
    """Raise UserError for replicas that this cluster can never hold."""
    wanted = [(f"models.{name}", m.at_start, m.resources) for name, m in spec.models.items()]
    asked = [(name, count, each.cpus_per_replica, each.gpus_per_replica) for name, count, each in wanted]
    asked.append(("gateway", spec.gateway.at_start, spec.gateway.cpus_per_replica, 0.0))
    grown = growth.at_full_size(nodes)
    if wrong := [sentence for each in asked if (sentence := room.never(*each, nodes, grown))]:
        raise UserError("\n".join(wrong))


def fits_beside(settings: ModelServeSpec, nodes: Sequence[Node]) -> bool:
    """Say whether a model's new replicas have room beside what runs, so that an update has no gap."""
    wanted = settings.resources
    return room.fits_now(settings.at_start, wanted.cpus_per_replica, wanted.gpus_per_replica, nodes)


def drained_first(spec: ServeSpec, nodes: Sequence[Node], there: Mapping[str, int]) -> Iterator[str]:
    """Say which models, if they change, are drained before their new replicas start, and what that means for requests.

    Args:
        there: the replicas that there are, by the application's name.
    """
    if spec.drain_s <= spec.gateway.max_wait_s:
        return
    for name, settings in spec.models.items():
        if there.get(model_app(spec.name, name)) and not fits_beside(settings, nodes):
            yield (
                f"{name}: no room for new replicas beside the old ones: where it changes, these end their streams "
                f"first, within drain_s ({spec.drain_s:g} s), and a request that waits longer than gateway.max_wait_s "
                f"({spec.gateway.max_wait_s:g} s) meanwhile is refused"
            )


def keys(spec: ServeSpec, nodes: Sequence[Node]) -> int:
    """Try the store of keys before gateways need it, and return how many keys can call.

    Raises:
        UserError: it cannot be used.
    """
    alive = [node for node in nodes if node.alive]
    if spec.keys.store is None and len(alive) > 1:
        raise UserError(
            f"keys.store: a file serves one machine, and the cluster has {len(alive)} nodes: name a PostgreSQL "
            "database that all of them reach"
        )
    store = Store(spec.keys.store)
    live = sum(key.revoked is None for key in store.all())
    store.close()
    return live


def emulated(spec: ServeSpec) -> Iterator[str]:
    """Say which models will be slow because a node that may hold a replica emulates the bf16 they ask for."""
    for name, model in spec.models.items():
        if model.precision == "bf16":
            wanted = model.resources
            nodes = devices.able_to_hold(wanted.cpus_per_replica, wanted.gpus_per_replica)
            found = devices.ask(nodes, on_gpu=wanted.gpus_per_replica > 0)
            if warning := decide(model.precision, found).warning:
                yield f"{name}: warning: {warning}"
