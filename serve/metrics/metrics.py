"""The metrics of the whole endpoint, as any of its gateways can tell them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any

from serve.metrics.departed import LeftGateway
from serve.metrics.exposition import of_replicas, write
from serve.metrics.packing import pack, unpack
from serve.metrics.record import Record
from serve.metrics.series import Sample, Snapshot
from serve.wire import GatewayState, ReplicaState

Reports = Sequence[Any]
"""What senders told the state actor."""


async def _no_reports() -> Reports:
    return ()


class Metrics:
    """This gateway's own numbers as they are, and those of the others as they told them last."""

    def __init__(
        self,
        record: Record,
        reports: Callable[[], Awaitable[Reports]] = _no_reports,
        extra: Callable[[Reports], Iterable[Sample]] = lambda reports: (),
    ) -> None:
        """`extra` makes samples of reports that are neither a gateway's nor a replica's: decisions of scaling."""
        self.record = record
        self._reports, self._extra = reports, extra

    def told(self, models: Collection[str]) -> dict[str, Any]:
        """Return what this gateway tells of itself: `GatewayState.metrics`."""
        return pack(self.record.snapshot(models))

    async def exposition(
        self, models: Collection[str], replicas: Sequence[ReplicaState], pending: Counter[str], accept: str | None
    ) -> tuple[bytes, str]:
        """Return what /metrics answers, and its content type. `models` are those that are served."""
        reports = await self._reports()
        left = [each.metrics for each in reports if isinstance(each, LeftGateway)]
        others = [each.metrics for each in reports if isinstance(each, GatewayState) and each.metrics]
        gateways = len({self.record.gateway, *(each["gateway"] for each in others)})
        newest = {each["gateway"]: each for each in (*left, *others) if each["gateway"] != self.record.gateway}
        samples = [*of_replicas(models, replicas, pending, gateways), *self._extra(reports)]
        own = self.record.snapshot(models)
        # In a thread: many models and keys take 0.1 s and more.
        return await asyncio.to_thread(_written, own, list(newest.values()), samples, accept)


def _written(
    own: Snapshot, others: Sequence[dict[str, Any]], samples: Sequence[Sample], accept: str | None
) -> tuple[bytes, str]:
    return write([*(unpack(each) for each in others), own], samples, accept)
