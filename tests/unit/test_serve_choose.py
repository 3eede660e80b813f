"""Which replica answers: prefixes against load, sessions, and what is remembered."""

import pytest
from starlette.requests import Request

from serve.api.callers import SCOPE_KEY, Caller
from serve.api.gateway import session_of
from serve.api.openai_api import in_session, parse_completion
from serve.keys.limits import Limits
from serve.routing.choose import (
    BLOCK_BYTES,
    MOST_BLOCKS,
    REMEMBERED_BLOCKS,
    REMEMBERED_REPLICAS,
    ByPrefix,
    Candidate,
    blocks_of,
    by_rendezvous,
    load_cost,
)
from serve.wire import GenerateCall, InferCall, Tools

LONG = "The rules of the house, which every guest reads first. " * 200  # 11,000 bytes, 2,750 tokens


def replica(name, own=0, others=0, slots=16):
    return Candidate(name, "1", slots, own, others)


def call(prompt, session=None):
    return GenerateCall("r", prompt, session=session)


def test_the_least_busy_takes_what_has_nothing_in_common():
    assert ByPrefix().choose("m", call("hello"), [replica("a", 3), replica("b", 1, 1)]).replica_id == "b"
    assert ByPrefix().choose("m", InferCall("r", {}), [replica("a", 3), replica("b", 2)]).replica_id == "b"


def test_work_is_counted_for_each_slot_and_for_other_gateways_too():
    few, many = replica("few", own=3, slots=4), replica("many", own=6, slots=32)
    assert ByPrefix().choose("m", call("hello"), [few, many]) is many
    assert ByPrefix().choose("m", call("hello"), [replica("a", 0, 5), replica("b", 4, 0)]).replica_id == "b"


def test_a_prefix_draws_until_the_load_costs_more_than_reading_it_again():
    chooser = ByPrefix()
    first = chooser.choose("m", call(LONG + "one"), [replica("a"), replica("b")])
    other = "b" if first.replica_id == "a" else "a"
    tokens = len(blocks_of(call(LONG))) * BLOCK_BYTES / 4
    for more in range(16):
        chosen = chooser.choose("m", call(LONG + "two"), [replica(first.replica_id, more), replica(other)])
        if chosen.replica_id == other:
            break
    assert load_cost(replica("a", more - 1)) <= tokens < load_cost(replica("a", more))
    assert 1 < more < 16


def test_once_read_at_both_the_less_busy_one_has_it():
    chooser = ByPrefix()
    both = [replica("a"), replica("b", 1)]
    assert chooser.choose("m", call(LONG), both).replica_id == "a"
    assert chooser.choose("m", call(LONG), [replica("a", 15), replica("b", 1)]).replica_id == "b"
    assert chooser.choose("m", call(LONG), [replica("a", 3), replica("b", 2)]).replica_id == "b"


def test_a_full_replica_is_left_though_it_has_the_prefix():
    chooser = ByPrefix()
    chooser.choose("m", call(LONG), [replica("a"), replica("b", 1)])
    assert chooser.choose("m", call(LONG), [replica("a", own=16), replica("b", own=8)]).replica_id == "b"


def test_a_conversation_that_goes_on_has_the_beginning_of_the_one_before():
    said = ({"role": "user", "content": LONG},)
    longer = (*said, {"role": "assistant", "content": "Well."}, {"role": "user", "content": "Go on."})
    short, more = blocks_of(call(said)), blocks_of(call(longer))
    assert more[: len(short)] == short
    with_tools = GenerateCall("r", said, tools=Tools(({"name": "f", "parameters": {}},)))
    assert blocks_of(with_tools)[0] != short[0]


def test_token_ids_are_compared_too_and_the_first_difference_ends_it():
    ids = tuple(range(1000))
    other = (*ids[:500], 7, *ids[501:])
    one, two = blocks_of(call(ids)), blocks_of(call(other))
    same = sum(a == b for a, b in zip(one, two, strict=True))
    assert one[:same] == two[:same]
    assert 0 < same < len(one)
    assert not set(one[same:]) & set(two[same:])


def test_a_session_has_one_replica_at_every_gateway():
    three = [replica("a"), replica("b"), replica("c")]
    homes = {f"s{n}": by_rendezvous(f"s{n}", three).replica_id for n in range(300)}
    assert all(
        ByPrefix().choose("m", call("x", s), list(reversed(three))).replica_id == home for s, home in homes.items()
    )
    assert min(list(homes.values()).count(each.replica_id) for each in three) > 60
    without_c = {s: by_rendezvous(s, three[:2]).replica_id for s in homes}
    assert all(without_c[s] == home for s, home in homes.items() if home != "c")


def test_a_session_whose_replica_is_full_goes_elsewhere_unless_all_are():
    home = by_rendezvous("s", [replica("a"), replica("b")]).replica_id
    other = "b" if home == "a" else "a"
    full = [replica(home, 16), replica(other, 3)]
    assert ByPrefix().choose("m", call("x", "s"), full).replica_id == other
    assert ByPrefix().choose("m", call("x", "s"), [replica(home, 16), replica(other, 16)]).replica_id == home


def test_what_is_remembered_is_bounded_and_goes_with_the_replica():
    chooser = ByPrefix()
    pair = [replica("a"), replica("b", 15)]
    for number in range(REMEMBERED_BLOCKS // MOST_BLOCKS + 2):
        chooser.choose("m", call(chr(65 + number) * BLOCK_BYTES * (MOST_BLOCKS + 5)), pair)
    assert len(chooser._read["a"]) == REMEMBERED_BLOCKS
    assert len(blocks_of(call("x" * BLOCK_BYTES * (MOST_BLOCKS + 5)))) == MOST_BLOCKS
    for number in range(REMEMBERED_REPLICAS + 3):
        chooser.choose("m", call("x" * BLOCK_BYTES), [replica(f"r{number}")])
    assert "a" not in chooser._read
    assert len(chooser._read) == REMEMBERED_REPLICAS


@pytest.mark.parametrize("prompt", ["", "short", (), (1, 2), ({"role": "user", "content": "\ud800"},), "\ud800" * 300])
def test_any_prompt_has_blocks(prompt):
    assert len(blocks_of(call(prompt))) == (0 if len(prompt) < 100 else 3)


@pytest.mark.parametrize(
    ("headers", "body", "session"),
    [
        ({}, {}, None),
        ({"x-session-id": "s1"}, {}, "alice:s1"),
        ({}, {"prompt_cache_key": "p"}, "alice:p"),
        ({"x-session-id": "s1"}, {"prompt_cache_key": "p"}, "alice:s1"),
        ({}, {"prompt_cache_key": 7}, None),
        ({"x-session-id": "x" * 500}, {}, "alice:" + "x" * 200),
    ],
)
def test_a_session_is_named_by_its_client_and_is_its_keys_own(headers, body, session):
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    request = Request({"type": "http", "headers": raw, SCOPE_KEY: Caller("alice", Limits())})
    assert session_of(request, body) == session
    asked = parse_completion({"model": "m", "prompt": ["a", "b"]}, "r")
    assert {call.session for call in in_session(asked, session).calls} == {session}
