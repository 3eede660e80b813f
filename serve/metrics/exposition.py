"""The numbers of an endpoint in Prometheus' text format, or in OpenMetrics where the scraper asks for it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from serve.metrics.series import OF_GATEWAYS, SERIES, Sample, Snapshot
from serve.wire import ReplicaState

FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
Rows = Mapping[str, Sequence[tuple[Sequence[str], Any]]]
"""By series: label values, and a number or the (buckets, sum) of a histogram."""


def write(snapshots: Iterable[Snapshot], samples: Iterable[Sample], accept: str | None) -> tuple[bytes, str]:
    """Return the body and its content type.

    Args:
        snapshots: One of every gateway.
        samples: All else.
        accept: What the scraper can read, as its header says.

    Raises:
        ValueError: a sample of a series that is not in the table, or with other labels.
    """
    rows: dict[str, list[tuple[Sequence[str], Any]]] = defaultdict(list)
    for snapshot in snapshots:
        for name, labels, value in _of_gateway(snapshot):
            rows[name].append(([*labels, snapshot["gateway"]], value))
    for sample in samples:
        series = SERIES.get(sample.name)
        if series is None or set(series.labels) != set(sample.labels):
            raise ValueError(f"{sample.name} with the labels {sorted(sample.labels)} is not in serve/metrics/series.py")
        rows[sample.name].append(([sample.labels[label] for label in series.labels], sample.value))
    encode, content_type = choose_encoder(accept or "")
    return encode(_Endpoint(rows)), content_type


def of_replicas(
    models: Iterable[str], replicas: Sequence[ReplicaState], pending: Counter[str], gateways: int
) -> Iterator[Sample]:
    """Give what is so now: how busy each model's replicas are."""
    for model in models:
        own = [replica for replica in replicas if replica.model == model]
        loads = [replica.load for replica in own]
        leaving = sum(replica.leaving for replica in own)
        for name, value in (
            ("tandem_requests_running", sum(load.running for load in loads)),
            ("tandem_requests_waiting", pending[model] + sum(load.waiting for load in loads)),
            ("tandem_cache_tokens_used", sum(load.cache_tokens_used for load in loads)),
            ("tandem_cache_tokens_capacity", sum(load.cache_tokens_total for load in loads)),
            ("tandem_tokens_per_second", sum(load.tokens_per_second for load in loads)),
        ):
            yield Sample(name, {"model": model}, value)
        yield Sample("tandem_replicas", {"model": model, "state": "ready"}, len(own) - leaving)
        yield Sample("tandem_replicas", {"model": model, "state": "leaving"}, leaving)
    yield Sample("tandem_gateways", {}, gateways)


class _Endpoint(Collector):
    """What prometheus_client encodes. No registry of the process has a part in it."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def collect(self) -> Iterator[Any]:
        for name, series in SERIES.items():
            own = ("gateway",) if name in OF_GATEWAYS else ()
            family = FAMILIES[series.kind](name, series.help, labels=(*series.labels, *own))
            for labels, value in self._rows.get(name, ()):
                family.add_metric(labels, *(value if series.kind == "histogram" else (value,)))
            yield family


def _of_gateway(snapshot: Snapshot) -> Iterator[tuple[str, Sequence[str], Any]]:
    """Give a gateway's series that this version knows; while it is replaced, one of another version tells too."""
    for name, counted in snapshot["counters"].items():
        if name in OF_GATEWAYS:
            yield from ((name, labels, value) for labels, value in counted)
    for name, observed in snapshot["histograms"].items():
        if name in OF_GATEWAYS:
            for labels, bounds, counts, total in observed:
                named = [*(repr(float(bound)) for bound in bounds), "+Inf"]
                yield name, labels, (list(zip(named, accumulate(counts), strict=True)), total)
