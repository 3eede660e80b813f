"""Rates and concurrency over several gateways, decided at given times."""

from __future__ import annotations

import json
import math

import pytest

from serve.keys.limiter import GATEWAY_SILENT_S, LOOK_AGAIN_S, Limiter
from serve.keys.limits import Limits


def admitted(limiter: Limiter, limits: Limits, times: list[float], tokens: int = 0, gateways: int = 2) -> list[bool]:
    verdicts = [limiter.begin(now, f"g{at % gateways}", "k", limits, tokens) for at, now in enumerate(times)]
    return [verdict.refused_by is None for verdict in verdicts]


def test_a_minute_has_so_many_requests_over_all_gateways() -> None:
    assert admitted(Limiter(), Limits(requests_per_minute=3), [0.0] * 5) == [True] * 3 + [False] * 2


def test_requests_come_back_evenly() -> None:
    limiter, limits = Limiter(), Limits(requests_per_minute=6)
    assert sum(admitted(limiter, limits, [0.0] * 6)) == 6
    verdict = limiter.begin(4.0, "g0", "k", limits, 0)
    assert verdict.refused_by == "requests_per_minute"
    assert verdict.retry_after_s == pytest.approx(6.0)
    assert limiter.begin(10.0, "g0", "k", limits, 0).refused_by is None


def test_tokens_are_reserved_and_given_back() -> None:
    limiter, limits = Limiter(), Limits(tokens_per_minute=600)
    first = limiter.begin(0.0, "g0", "k", limits, 500)
    assert (first.refused_by, first.reserved, first.tokens and first.tokens.remaining) == (None, 500, 100)
    second = limiter.begin(0.0, "g1", "k", limits, 200)
    assert (second.refused_by, second.reserved, second.retry_after_s) == ("tokens_per_minute", 0, 10.0)
    limiter.end(0.0, "g0", "k", first.reserved, used=50)
    assert limiter.begin(0.0, "g1", "k", limits, 200).refused_by is None


def test_more_used_than_reserved_is_owed() -> None:
    limiter, limits = Limiter(), Limits(tokens_per_minute=60)
    verdict = limiter.begin(0.0, "g0", "k", limits, 10)
    limiter.end(0.0, "g0", "k", verdict.reserved, used=90)
    assert limiter.begin(0.0, "g0", "k", limits, 1).retry_after_s == pytest.approx(31.0)


def test_a_request_above_a_minutes_tokens_waits_for_a_full_bucket_only() -> None:
    limiter, limits = Limiter(), Limits(tokens_per_minute=60)
    assert limiter.begin(0.0, "g0", "k", limits, 1000).reserved == 60
    assert limiter.begin(1.0, "g0", "k", limits, 1000).retry_after_s == pytest.approx(59.0)


def test_concurrency_counts_over_gateways_and_frees() -> None:
    limiter, limits = Limiter(), Limits(concurrency=2)
    assert admitted(limiter, limits, [0.0] * 3) == [True, True, False]
    limiter.end(0.0, "g1", "k", 0, 0)
    assert admitted(limiter, limits, [0.0] * 2) == [True, False]


def test_what_a_dead_gateway_had_in_flight_ends_with_it() -> None:
    limiter, limits = Limiter(), Limits(concurrency=1)
    assert admitted(limiter, limits, [0.0], gateways=1) == [True]
    limiter.heard(1.0, "g1", {})
    assert limiter.begin(1.0, "g1", "k", limits, 0).refused_by == "concurrency"
    limiter.heard(0.1 + GATEWAY_SILENT_S, "g1", {})
    assert limiter.begin(6.0, "g1", "k", limits, 0).refused_by is None


def test_a_limiter_that_starts_anew_learns_what_is_in_flight() -> None:
    limiter, limits = Limiter(), Limits(concurrency=3)
    limiter.begin(0.0, "g0", "k", limits, 0)
    limiter.heard(0.5, "g0", {"k": 3})
    assert limiter.begin(0.6, "g0", "k", limits, 0).refused_by == "concurrency"


def test_a_request_for_several_texts_takes_as_many_places() -> None:
    limiter, limits = Limiter(), Limits(concurrency=4)
    assert limiter.begin(0.0, "g0", "k", limits, 0, texts=3).refused_by is None
    second = limiter.begin(0.0, "g1", "k", limits, 0, texts=2)
    assert (second.refused_by, second.retry_after_s) == ("concurrency", LOOK_AGAIN_S)
    assert limiter.begin(0.0, "g1", "k", limits, 0).refused_by is None
    limiter.end(1.0, "g0", "k", 0, 0, texts=3)
    assert limiter.begin(1.0, "g1", "k", limits, 0, texts=3).refused_by is None


def test_more_texts_than_the_key_may_ever_have_are_refused_for_ever() -> None:
    verdict = Limiter().begin(0.0, "g", "k", Limits(concurrency=4), 0, texts=5)
    assert (verdict.refused_by, verdict.retry_after_s) == ("concurrency", math.inf)


def test_another_limiter_goes_on_from_what_this_one_knows() -> None:
    """With a clock of its own, and over bytes that any version can read."""
    limits = Limits(requests_per_minute=6, tokens_per_minute=600, concurrency=3)
    before, after = Limiter(), Limiter()
    assert before.begin(100.0, "g0", "k", limits, 500, texts=2).refused_by is None
    after.take(0.0, json.loads(json.dumps(before.told(105.0))))
    (first, second) = (after.begin(0.0, gateway, "k", limits, 10) for gateway in ("g0", "g1"))
    assert (first.refused_by, second.refused_by) == (None, "concurrency")
    assert first.tokens is not None
    assert first.requests is not None
    assert (first.tokens.remaining, first.requests.remaining) == (140, 4)
    after.heard(GATEWAY_SILENT_S - 4.9 + 0.1, "g1", {})  # g0 was heard 5 s before, and as it asked
    assert after.begin(0.5, "g1", "k", limits, 10, texts=2).refused_by == "concurrency"
    after.heard(GATEWAY_SILENT_S + 0.6, "g1", {})
    assert after.begin(GATEWAY_SILENT_S + 0.6, "g1", "k", limits, 10, texts=2).refused_by is None


def test_limits_that_change_keep_the_share_that_is_left() -> None:
    limiter = Limiter()
    for _ in range(5):
        limiter.begin(0.0, "g0", "k", Limits(requests_per_minute=10), 0)
    verdict = limiter.begin(0.0, "g0", "k", Limits(requests_per_minute=100), 0)
    assert verdict.requests is not None
    assert verdict.requests.remaining == 49


def test_no_limits_admit_everything() -> None:
    verdict = Limiter().begin(0.0, "g", "k", Limits(), 10**9)
    assert verdict == (None, 0.0, 0, None, None)


def test_idle_keys_are_forgotten_and_busy_ones_are_not() -> None:
    limiter = Limiter()
    limiter.begin(0.0, "g", "busy", Limits(concurrency=1), 0)
    limiter.begin(0.0, "g", "idle", Limits(requests_per_minute=60), 0)
    limiter.end(0.0, "g", "idle", 0, 0)
    limiter.forget_idle(0.5)
    assert len(limiter) == 2
    limiter.forget_idle(2.0)
    assert len(limiter) == 1
    assert limiter.begin(2.0, "g", "busy", Limits(concurrency=1), 0).refused_by == "concurrency"
