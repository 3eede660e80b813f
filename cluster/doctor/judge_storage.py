"""Whether what one node writes into the storage is what another reads there. Pure."""

from __future__ import annotations

from cluster.doctor.facts import Facts, Finding, Storage

WHY = "a job that spans nodes cannot find its checkpoints there, and ends"
WAY_OUT = "mount one folder on all nodes, or name an object store's URI, and give it as `storage`"
UNNAMED = " (nobody named one; if your specs do, ask with --storage PLACE)"


def verdicts(facts: Facts) -> list[Finding]:
    """Name the nodes that cannot write, those that have another place of the same name, and what else was not read."""
    storage = facts.storage
    if storage is None:
        return []
    label = {node.node_id: node.label for node in facts.nodes}
    place = f"{storage.place}{UNNAMED if storage.is_default else ''}"
    found = _unwritten(storage, place, label)
    apart = alone(storage, list(storage.asked))
    if len(apart) > 1 and len(apart) == len(storage.asked):
        what = f"{place} is not shared: no node finds there what another has written"
        return [*found, Finding("error", "", what, WHY, WAY_OUT)]
    for node_id in apart:
        what = f"has another {place} than the other nodes: neither finds what the other has written"
        found.append(Finding("error", label[node_id], what, WHY, WAY_OUT))
    for reader, by_writer in storage.not_read.items():
        rest = {writer: reason for writer, reason in by_writer.items() if not {reader, writer} & set(apart)}
        if rest:
            whose = ", ".join(label[writer] for writer in rest)
            what = f"cannot read in {place} what {whose} wrote: {min(rest.values())}"
            found.append(Finding("error", label[reader], what, WHY, WAY_OUT))
    return found


def alone(storage: Storage, nodes: list[str]) -> list[str]:
    """Return the nodes that find nothing of what others wrote, and of whose files no other finds any."""
    writers = {node for node in nodes if node not in storage.not_written}
    pairs = [(reader, writer) for reader in nodes for writer in writers if reader != writer]
    seen = {pair for pair in pairs if pair[1] not in storage.not_read.get(pair[0], {})}
    return [one for one in nodes if any(one in pair for pair in pairs) and not any(one in pair for pair in seen)]


def _unwritten(storage: Storage, place: str, label: dict[str, str]) -> list[Finding]:
    found = []
    for node_id, reason in storage.not_written.items():
        why = "checkpoints, logs and models of a job with workers there go there"
        way_out = "mount it there, writable for whom Ray runs as"
        found.append(Finding("error", label[node_id], f"cannot write into {place}: {reason}", why, way_out))
    for node_id, reason in storage.left.items():
        what = f"the doctor's file in {storage.place} could not be removed: {reason}"
        why = "it is small, and in nobody's way"
        found.append(Finding("warning", label[node_id], what, why, "remove .tandem-doctor-* there"))
    return found
