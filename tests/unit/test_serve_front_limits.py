"""What takes too long, as a table; and what a request is called, told and timed by."""

from __future__ import annotations

import math

import pytest

from serve.api.body import ApiError
from serve.front import exchange
from serve.front.app import wanted_s
from serve.front.limits import Limits, Overdue, Pace, overdue

LIMITS = Limits(head_s=10, body_s=10, body_bytes_per_s=500, reader_s=60)


@pytest.mark.parametrize(
    ("pace", "now", "answering", "expected"),
    [
        (Pace(), 1e9, False, None),
        (Pace(head_since=100), 110, False, None),
        (Pace(head_since=100), 110.1, False, "head"),
        (Pace(head_since=100), 500, True, None),  # the next request's head, behind one that is answered
        (Pace(body_since=100, body_moved=100), 110, True, None),
        (Pace(body_since=100, body_moved=100), 110.1, True, "body"),
        (Pace(body_since=100, body_moved=105, body_bytes=7000), 112, True, None),
        (Pace(body_since=100, body_moved=111, body_bytes=5000), 112, True, "body"),  # 417 a second
        (Pace(body_since=100, body_moved=109, body_bytes=1), 110, True, None),  # a rate counts after the pause's time
        (Pace(body_since=100, body_moved=129, body_bytes=15_500), 130, True, None),
        (Pace(body_since=100, body_moved=130, body_bytes=15_500), 130.3, True, "body"),
        (Pace(body_since=100, body_moved=257, body_bytes=8 * 2**20), 258, True, None),  # 128 s for 8 MiB
        (Pace(body_since=100, body_moved=258, body_bytes=8 * 2**20), 258.1, True, "body"),
        (Pace(unread_since=100), 160, True, None),
        (Pace(unread_since=100), 160.1, True, "reader"),
        (Pace(closing_since=100), 110.1, False, "closing"),
    ],
)
def test_what_takes_too_long(pace: Pace, now: float, answering: bool, expected: Overdue | None) -> None:
    assert overdue(pace, now, answering, LIMITS) == expected


def test_what_the_server_does_not_read_is_not_the_client_s_fault() -> None:
    pace = Pace(body_since=100, body_moved=100, body_bytes=10)
    pace.hold(15)
    assert overdue(pace, 124, True, LIMITS) is None
    assert overdue(pace, 126, True, LIMITS) == "body"
    Pace().hold(15)


@pytest.mark.parametrize(
    ("sent", "is_kept"),
    [
        (b"abc-1.2:3/4", True),
        (b"a" * 128, True),
        (b"a" * 129, False),
        (b"", False),
        (b"a b", False),
        (b'"}\\', False),
        (b"<script>", False),
        ("é".encode(), False),
        (b"a\tb", False),
    ],
)
def test_a_request_s_id_is_the_client_s_if_it_is_sane(sent: bytes, is_kept: bool) -> None:
    found = exchange.begin("GET", "10.0.0.1", [(b"x-request-id", sent)])
    assert (found.request_id == sent.decode("latin-1")) == is_kept
    assert found.is_made != is_kept
    assert exchange.REQUEST_ID.fullmatch(found.request_id.encode())


def test_what_an_engine_is_asked_has_an_id_of_its_own() -> None:
    twice = [exchange.begin("GET", "", [(b"x-request-id", b"mine")]).call_id for _ in range(2)]
    assert all(each.startswith("mine.") for each in twice)
    assert twice[0] != twice[1]
    made = exchange.begin("GET", "", [])
    assert made.call_id == made.request_id


TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (TRACE, TRACE),
        (f" {TRACE} ", TRACE),
        (TRACE.upper(), None),
        (TRACE.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32), None),
        (TRACE.replace("00f067aa0ba902b7", "0" * 16), None),
        (f"{TRACE}-more", None),
        (f"ff{TRACE[2:]}", None),
        ("", None),
        (TRACE[:-1], None),
    ],
)
def test_a_traceparent_is_valid_or_was_not_sent(sent: str, expected: str | None) -> None:
    states = [(b"tracestate", b"a=1, b=2"), (b"tracestate", b"c=3 ")]
    begun = exchange.begin("GET", "", [states[0], (b"traceparent", sent.encode()), states[1]])
    assert begun.carried == {"trace": expected, "trace_state": expected and "a=1, b=2,c=3"}


@pytest.mark.parametrize(
    ("sent", "most_s", "expected"),
    [
        (None, None, None),
        (None, 30.0, 30.0),
        (b"5", None, 5.0),
        (b"0.5", 30.0, 0.5),
        (b"60", 30.0, 30.0),
    ],
)
def test_a_client_may_ask_for_less_time(sent: bytes | None, most_s: float | None, expected: float | None) -> None:
    headers = [] if sent is None else [(b"x-tandem-timeout-s", sent)]
    assert wanted_s([(b"x-request-timeout-seconds", b"0"), *headers], most_s) == expected


@pytest.mark.parametrize("sent", [b"0", b"-1", b"nan", b"inf", b"1e400", b"", b"5s", "٣\xff".encode()])
def test_a_time_that_is_none_is_refused(sent: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        wanted_s([(b"x-tandem-timeout-s", sent)], 30.0)
    assert (caught.value.status, caught.value.param) == (400, "x-tandem-timeout-s")


def test_the_wait_for_a_turn_ends_with_the_request_s_time() -> None:
    found = exchange.Exchange(began=0.0)
    assert found.patience_s(60) == 60
    found.expires = -math.inf
    assert found.patience_s(60) == 0
