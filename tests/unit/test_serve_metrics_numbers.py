"""Histograms, the busiest keys, gateways that ended, and how several gateways' numbers become one text."""

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
import random
import statistics
from collections import Counter
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain
from typer.testing import CliRunner

from cluster.errors import UserError
from serve.api import routes
from serve.keys.cli import app as keys_cli
from serve.keys.limits import Limits
from serve.metrics.busiest import LOOK_S, BusiestKeys
from serve.metrics.departed import KEPT_S, MOST, Departed, LeftGateway
from serve.metrics.exposition import write
from serve.metrics.histogram import SECONDS, TOKEN_SECONDS, Histogram
from serve.metrics.metrics import Metrics
from serve.metrics.packing import pack, unpack
from serve.metrics.record import MOST_KINDS, Record
from serve.metrics.series import Sample
from serve.metrics.watch import RouteNames, Watch, Watched, current
from serve.wire import GatewayState


class Clock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def told(text: bytes, name: str, parse: Any = plain) -> dict[tuple[tuple[str, str], ...], float]:
    return {
        tuple(sorted(sample.labels.items())): sample.value
        for family in parse(text.decode())
        for sample in family.samples
        if sample.name == name
    }


def test_a_value_on_a_bound_is_within_it_as_prometheus_has_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.1, 1e9):
        histogram.observe(value)
    assert (histogram.counts, histogram.sum) == ([2, 2, 2], pytest.approx(6.6 + 1e9))


def test_buckets_fit_a_millisecond_and_minutes_alike() -> None:
    for bounds in (SECONDS, TOKEN_SECONDS):
        assert list(bounds) == sorted(set(bounds))
        assert bounds[0] <= 0.001
        assert bounds[-1] >= 60
        assert max(b / a for a, b in itertools.pairwise(bounds)) <= 12
    seen = random.Random(0)
    times = [seen.lognormvariate(-3, 1) for _ in range(5000)]  # 50 ms at the median
    histogram = Histogram(SECONDS)
    for time in times:
        histogram.observe(time)
    half, below = 2500, 0
    for bound, count, lower in zip(SECONDS, histogram.counts, (0.0, *SECONDS), strict=False):
        if below + count >= half:
            median = lower + (bound - lower) * (half - below) / count  # as histogram_quantile does it
            break
        below += count
    assert median == pytest.approx(statistics.median(times), rel=0.25)


def test_all_that_keys_use_is_told_once_and_other_never_falls() -> None:
    clock, chance = Clock(), random.Random(1)
    keys = BusiestKeys(most=3, clock=clock)
    used, other = 0, 0
    for minute in range(30):
        clock.now = minute * LOOK_S
        for _ in range(200):
            # the busy ones change every ten minutes
            key = f"k{minute // 10 * 3 + chance.randrange(3)}" if chance.random() < 0.8 else f"k{chance.randrange(40)}"
            keys.add(key, "m", "prompt", 10)
            used += 10
        totals = keys.totals()
        assert sum(totals.values()) == used
        assert len(totals) <= 4
        assert totals.get(("other", "m", "prompt"), 0) >= other
        other = totals.get(("other", "m", "prompt"), 0)
    assert {key for key, _, _ in keys.totals()} == {"k6", "k7", "k8", "other"}


def test_keys_that_are_alike_do_not_change_places() -> None:
    clock = Clock()
    keys = BusiestKeys(most=2, clock=clock)
    for minute in range(20):
        clock.now = minute * LOOK_S
        for key in ("a", "b", "c", "d"):
            keys.add(key, "m", "prompt", 100)
        assert {key for key, _, _ in keys.totals()} == {"a", "b", "other"}


def test_a_key_of_the_name_other_is_one_of_the_others() -> None:
    keys = BusiestKeys(most=5)
    keys.add("other", "m", "prompt", 1)
    keys.add("a", "m", "prompt", 2)
    assert keys.totals() == {("other", "m", "prompt"): 1, ("a", "m", "prompt"): 2}


def test_kinds_of_errors_are_bounded() -> None:
    record = Record("g")
    for at in range(MOST_KINDS + 50):
        record.error("m", f"kind-{at}")
    rows = record.snapshot(["m"])["counters"]["tandem_errors_total"]
    assert len(rows) == MOST_KINDS + 1
    assert [["", "other"], 50] in rows


def test_a_snapshot_is_plain_data_of_the_models_that_are_served() -> None:
    record = Record("g")
    record.model("old").generated = 5
    record.request("old", "/v1/completions", 200)
    record.request("", "/v1/completions", 401)
    record.resumed("new")
    snapshot = record.snapshot(["new"])
    assert unpack(pack(snapshot)) == snapshot
    assert len(pickle.dumps(pack(snapshot))) < len(pickle.dumps(snapshot)) / 2
    assert "old" not in json.dumps(snapshot)
    assert snapshot["counters"]["tandem_streams_resumed_total"] == [[["new"], 1]]
    assert snapshot["counters"]["tandem_requests_total"] == [[["", "/v1/completions", "401"], 1]]


def test_buckets_are_told_as_sums_from_below() -> None:
    record = Record("g")
    for value in (0.0015, 0.0015, 3.0, 5000.0):
        record.model("m").queue.observe(value)
    body, _ = write([record.snapshot(["m"])], (), None)
    buckets = {dict(labels)["le"]: n for labels, n in told(body, "tandem_queue_seconds_bucket").items()}
    assert (buckets["0.001"], buckets["0.002"], buckets["2.0"], buckets["5.0"]) == (0, 2, 2, 3)
    assert (buckets["900.0"], buckets["+Inf"]) == (3, 4)
    assert list(told(body, "tandem_queue_seconds_count").values()) == [4]


def test_a_gateway_that_ended_is_told_on_until_scrapers_have_seen_it() -> None:
    record = Record("gone")
    record.request("", "/health", 200)
    state = GatewayState({}, metrics=pack(record.snapshot([])))
    departed = Departed()
    departed.add(0.0, state)
    departed.add(1.0, GatewayState({}))
    departed.add(1.0, "a replica's report")
    assert departed.read(KEPT_S - 1) == [LeftGateway(state.metrics)]
    assert departed.read(KEPT_S + 1) == []
    for at in range(3 * MOST):
        departed.add(float(at), state)
    assert len(departed.read(0.0)) == MOST


def test_a_gateway_that_was_only_silent_is_told_once_with_its_newest_numbers() -> None:
    record, own = Record("slow"), Record("own")
    record.request("", "/health", 200)
    early = LeftGateway(pack(record.snapshot([])))
    record.request("", "/health", 200)
    late = GatewayState({}, metrics=pack(record.snapshot([])))
    stale_of_own = GatewayState({}, metrics=pack(own.snapshot([])))
    own.request("", "/health", 200)

    async def reports() -> list[Any]:
        return [late, early, stale_of_own, GatewayState({"m": 1})]

    body, _ = asyncio.run(Metrics(own, reports).exposition([], [], Counter(), None))
    counted = told(body, "tandem_requests_total")
    assert {dict(labels)["gateway"]: n for labels, n in counted.items()} == {"slow": 2, "own": 1}
    assert told(body, "tandem_gateways") == {(): 2}


def test_a_gateway_of_another_version_tells_what_this_one_knows() -> None:
    snapshot = Record("new").snapshot(["m"])
    snapshot["counters"]["tandem_of_tomorrow_total"] = [[["m"], 1]]
    snapshot["histograms"]["tandem_queue_seconds"] = [[["m"], [1.0], [2, 1], 3.5]]
    body, _ = write([snapshot], (), None)
    assert b"tomorrow" not in body
    assert list(told(body, "tandem_queue_seconds_bucket").values()) == [2, 3]


def test_other_parts_tell_their_samples_in_declared_series_only() -> None:
    wanted = Sample("tandem_scaling_replicas_wanted", {"model": "m"}, 3)
    last = Sample("tandem_scaling_last_decision_info", {"reason": "rate", "model": "m"}, 1)
    for accept, parse in ((None, plain), ("application/openmetrics-text;version=1.0.0", openmetrics)):
        body, _ = write((), [wanted, last], accept)
        assert told(body, wanted.name, parse) == {(("model", "m"),): 3}
        assert told(body, last.name, parse) == {(("model", "m"), ("reason", "rate")): 1}
    for sample in (Sample("tandem_new", {}, 1), Sample("tandem_replicas", {"model": "m"}, 1)):
        with pytest.raises(ValueError, match=sample.name):
            write((), [sample], None)


def test_label_values_are_escaped() -> None:
    record = Record("g")
    record.error("", 'a"b\\c\nd')
    body, _ = write([record.snapshot([])], (), None)
    assert dict(next(iter(told(body, "tandem_errors_total"))))["kind"] == 'a"b\\c\nd'


def test_routes_have_the_names_that_the_app_gives_them() -> None:
    names = RouteNames(routes.build(lambda: None).routes)  # type: ignore[arg-type, return-value]
    for path, name in (
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/models", "/v1/models"),
        ("/v1/models/a/b", "/v1/models/{name}"),
        ("/v2/models/a/versions/3/infer", "/v2/models/{name}/versions/{version}/infer"),
        ("/v2/models/a/infer/", "/v2/models/{name}/infer"),
        ("/nothing", "other"),
        ("/metrics", "/metrics"),
    ):
        assert names.name(path) == name


def test_what_answers_before_the_routes_is_measured_once_where_both_are_watched() -> None:
    record = Record("g")

    async def early(scope: Any, receive: Any, send: Any) -> None:
        current().error("deadline_exceeded")
        await send({"type": "http.response.start", "status": 408, "headers": []})

    async def send(message: Any) -> None:
        pass

    inner = Watched(early, lambda: record, [])
    outer = Watched(inner, lambda: record, [])
    asyncio.run(outer({"type": "http", "path": "/x"}, None, send))  # type: ignore[arg-type]
    counters = record.snapshot([])["counters"]
    assert counters["tandem_requests_total"] == [[["", "other", "408"], 1]]
    assert counters["tandem_errors_total"] == [[["", "deadline_exceeded"], 1]]


def test_outside_of_a_request_nothing_is_read() -> None:
    watch = current()
    watch.model = "m"
    watch.admitted(1.0)
    assert current() is not watch


def test_a_request_that_was_not_admitted_counts_no_tokens() -> None:
    record = Record("g")
    watch = Watch(record)
    watch.tokens("alice", 10, 5)
    watch.end("/v1/completions", 429)
    assert record.keys.totals() == {}
    assert record.snapshot(["m"])["counters"]["tandem_generated_tokens_total"] == [[["m"], 0]]


def test_an_operators_key_takes_no_other_limits() -> None:
    assert Limits(operator=True).operator
    assert not Limits(priority="low").operator
    for other in ({"models": ("m",)}, {"priority": "low"}, {"tokens_per_day": 5}):
        with pytest.raises(ValueError, match=f"leave out {next(iter(other))}"):
            Limits(operator=True, **other)


def test_the_command_makes_an_operators_key(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    run = CliRunner()
    assert run.invoke(keys_cli, ["make", "prometheus", "--operator"]).exit_code == 0
    assert " operator " in run.invoke(keys_cli, ["list"]).output
    refused = run.invoke(keys_cli, ["make", "x", "--operator", "--concurrency", "2"])
    assert isinstance(refused.exception, UserError)
    assert str(refused.exception) == "--operator: an operator's key calls no model: leave out concurrency"
