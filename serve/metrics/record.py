"""What one gateway has counted since it began. Plain additions: it is written for every piece of every answer."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from serve.metrics.busiest import BusiestKeys
from serve.metrics.histogram import SECONDS, TOKEN_SECONDS, Histogram
from serve.metrics.series import Snapshot

MOST_KINDS = 200
"""Kinds of errors, with their models: codes are ours, but an engine of a user's own can name any."""


class ModelRecord:
    """The numbers of one model."""

    __slots__ = ("generated", "prompt", "queue", "request", "resumed", "to_first_token", "to_next_token")

    def __init__(self) -> None:
        self.to_first_token, self.queue, self.request = Histogram(SECONDS), Histogram(SECONDS), Histogram(SECONDS)
        self.to_next_token = Histogram(TOKEN_SECONDS)
        self.prompt = self.generated = self.resumed = 0


class Record:
    """All numbers of one gateway. Its methods are called on one event loop."""

    def __init__(self, gateway: str, keys: BusiestKeys | None = None) -> None:
        """`gateway` tells its numbers from those of other gateways."""
        self.gateway = gateway
        self.keys = keys or BusiestKeys()
        self._models: dict[str, ModelRecord] = {}
        self._requests: dict[tuple[str, str, str], int] = {}
        self._errors: dict[tuple[str, str], int] = {}

    def model(self, name: str) -> ModelRecord:
        """Return the numbers of a model that is served: never of a name that a client sent."""
        found = self._models.get(name)
        if found is None:
            found = self._models[name] = ModelRecord()
        return found

    def request(self, model: str, route: str, status: int) -> None:
        """Count a request that has ended."""
        labels = (model, route, str(status))
        self._requests[labels] = self._requests.get(labels, 0) + 1

    def error(self, model: str, kind: str) -> None:
        """Count an error that a client was told."""
        labels = (model, kind)
        if labels not in self._errors and len(self._errors) >= MOST_KINDS:
            labels = ("", "other")
        self._errors[labels] = self._errors.get(labels, 0) + 1

    def resumed(self, model: str) -> None:
        """Count an answer that goes on at another replica."""
        self.model(model).resumed += 1

    def snapshot(self, models: Collection[str]) -> Snapshot:
        """Return everything that there is of the models that are served now, zeros too, as JSON-like data."""
        served = {name: self.model(name) for name in models}
        keys = (each for each in self.keys.totals().items() if each[0][1] in served)
        known = {"", *served}
        counters: dict[str, list[Any]] = {
            "tandem_requests_total": _rows(each for each in self._requests.items() if each[0][0] in known),
            "tandem_errors_total": _rows(each for each in self._errors.items() if each[0][0] in known),
            "tandem_prompt_tokens_total": [[[name], each.prompt] for name, each in served.items()],
            "tandem_generated_tokens_total": [[[name], each.generated] for name, each in served.items()],
            "tandem_streams_resumed_total": [[[name], each.resumed] for name, each in served.items()],
            "tandem_key_tokens_total": _rows(keys),
        }
        histograms = {
            "tandem_time_to_first_token_seconds": [_row(name, each.to_first_token) for name, each in served.items()],
            "tandem_time_per_output_token_seconds": [_row(name, each.to_next_token) for name, each in served.items()],
            "tandem_queue_seconds": [_row(name, each.queue) for name, each in served.items()],
            "tandem_request_seconds": [_row(name, each.request) for name, each in served.items()],
        }
        return {"gateway": self.gateway, "counters": counters, "histograms": histograms}


def _rows(counted: Iterable[tuple[tuple[str, ...], int]]) -> list[Any]:
    return [[list(labels), value] for labels, value in counted]


def _row(model: str, histogram: Histogram) -> list[Any]:
    return [[model], list(histogram.bounds), list(histogram.counts), histogram.sum]
