"""The table of series that /metrics shows: names after Prometheus' conventions, kinds, labels and help.

Counters and histograms are each gateway's own and have its id as the label `gateway`: several gateways share a port, a
scrape meets any of them, and one that is missed once or has ended must not make a sum fall, which Prometheus would take
for a restart and count anew. So sums are for queries: `sum(rate(...))`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]
Snapshot = dict[str, Any]
"""One gateway's numbers as JSON: `gateway`, `counters` {name: [[labels, value]]}, `histograms` {name: [[labels, bounds,
counts, sum]]}, where counts are of each bucket alone, with one more for what is above the last bound."""


class Series(NamedTuple):
    """One series of the endpoint."""

    kind: Kind
    labels: Labels
    help: str


class Sample(NamedTuple):
    """One number of a series that other parts of the endpoint tell: the policy of scaling."""

    name: str
    labels: Mapping[str, str]
    value: float


SERIES: dict[str, Series] = {
    "tandem_requests_total": Series(
        "counter", ("model", "route", "status"), "HTTP requests that have ended. 499: the client left before an answer."
    ),
    "tandem_errors_total": Series(
        "counter",
        ("model", "kind"),
        "Errors that clients were told, by their code, those in the middle of streams too.",
    ),
    "tandem_time_to_first_token_seconds": Series(
        "histogram", ("model",), "From a request's arrival to its first generated token, whether streamed or not."
    ),
    "tandem_time_per_output_token_seconds": Series(
        "histogram", ("model",), "Mean time between an answer's tokens after its first ones, once an answer."
    ),
    "tandem_queue_seconds": Series("histogram", ("model",), "Time that admitted requests waited for their turn."),
    "tandem_request_seconds": Series("histogram", ("model",), "From arrival to the end, of admitted requests."),
    "tandem_prompt_tokens_total": Series("counter", ("model",), "Tokens of prompts and of texts to embed."),
    "tandem_generated_tokens_total": Series("counter", ("model",), "Generated tokens."),
    "tandem_key_tokens_total": Series(
        "counter", ("key", "model", "kind"), "Tokens of the busiest keys, by name; of all others as the key `other`."
    ),
    "tandem_streams_resumed_total": Series("counter", ("model",), "Answers that went on at another replica."),
    "tandem_requests_running": Series("gauge", ("model",), "Sequences that the replicas work on."),
    "tandem_requests_waiting": Series("gauge", ("model",), "Requests that wait for a turn or a replica."),
    "tandem_replicas": Series(
        "gauge", ("model", "state"), "Replicas that take requests, and that finish what they have."
    ),
    "tandem_cache_tokens_used": Series("gauge", ("model",), "Tokens in the KV caches of all replicas."),
    "tandem_cache_tokens_capacity": Series("gauge", ("model",), "Tokens that the KV caches of all replicas hold."),
    "tandem_tokens_per_second": Series("gauge", ("model",), "Tokens that the replicas generate a second now."),
    "tandem_gateways": Series("gauge", (), "Gateways that answer."),
    "tandem_scaling_replicas_wanted": Series("gauge", ("model",), "Replicas that scaling wants."),
    "tandem_scaling_decisions_total": Series(
        "counter", ("model", "direction"), "Changes of the number of replicas that scaling has decided."
    ),
    "tandem_scaling_last_decision_info": Series("gauge", ("model", "reason"), "1 for the reason of the last change."),
}
OF_GATEWAYS = frozenset(name for name, series in SERIES.items() if series.kind != "gauge") - {
    "tandem_scaling_decisions_total"
}
"""What each gateway counts for itself."""
