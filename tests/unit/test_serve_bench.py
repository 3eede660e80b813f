"""The load generator's deciders: arrivals, lengths, workload, figures and options, each against what is known."""

from __future__ import annotations

import itertools
import json
import math
import random
from array import array
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from serve.bench import arrivals, figures, lengths, plot, processes, settings
from serve.bench.answers import StreamedAnswer, WholeAnswer
from serve.bench.lengths import Length
from serve.bench.record import CUT, OK, RATE_LIMITED, UNFINISHED, Record
from serve.bench.settings import Caller, Settings
from serve.bench.workload import WORDS, WordRate, Workload, measured

HERE = settings.target("http://127.0.0.1:8000", allow_remote=False)


def made(**changes: Any) -> Settings:
    fixed = {"prompt_tokens": Length("fixed", 8), "answer_tokens": Length("fixed", 4)}
    return Settings(**{"target": HERE, "model": "m", "route": "chat", "users": 1, "rate": None, **fixed, **changes})


# -- arrivals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_gaps_have_the_rate_and_the_variation_of_a_gamma_process(burstiness: float, variation: float) -> None:
    moments = list(itertools.islice(arrivals.times(20.0, burstiness, seed=1), 40_000))
    gaps = [late - early for early, late in itertools.pairwise([0.0, *moments])]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(0.05, rel=0.03)
    assert deviation / mean == pytest.approx(variation, rel=0.03)


def test_an_infinite_burstiness_is_a_clock_and_a_seed_repeats_itself() -> None:
    assert list(itertools.islice(arrivals.times(4.0, math.inf, 0), 4)) == [0.25, 0.5, 0.75, 1.0]
    first, same, other = (list(itertools.islice(arrivals.times(4.0, 1.0, seed), 5)) for seed in (7, 7, 8))
    assert first == same != other


def test_arrivals_end_by_count_or_by_time() -> None:
    assert list(arrivals.bounded(iter([0.1, 0.2, 0.3, 9.0]), 2, 5.0)) == [(0, 0.1), (1, 0.2)]
    assert list(arrivals.bounded(iter([0.1, 0.2, 0.3, 9.0]), 10, 5.0)) == [(0, 0.1), (1, 0.2), (2, 0.3)]


def test_users_are_shared_out_in_whole_numbers_that_add_up() -> None:
    assert arrivals.shared(44, [10, 1]) == [40, 4]
    assert arrivals.shared(10, [1, 1, 1]) == [4, 3, 3]
    assert arrivals.shared(2, [1, 1, 1]) == [1, 1, 0]


def test_requests_are_drawn_for_keys_in_proportion() -> None:
    drawn = [arrivals.picked(number, [10, 1], seed=0) for number in range(11_000)]
    assert drawn.count(1) == pytest.approx(1_000, rel=0.1)
    assert drawn == [arrivals.picked(number, [10, 1], seed=0) for number in range(11_000)]


# -- lengths and the workload -----------------------------------------------------------------------------------------


def test_lengths_are_drawn_from_their_distributions() -> None:
    chance = random.Random(0)
    assert {lengths.parse("64", "--x").draw(chance) for _ in range(5)} == {64}
    assert {lengths.parse("uniform:3:5", "--x").draw(chance) for _ in range(100)} == {3, 4, 5}
    drawn = sorted(lengths.parse("lognormal:100:0.5", "--x").draw(chance) for _ in range(9_999))
    assert drawn[4_999] == pytest.approx(100, rel=0.05)
    assert drawn[8_413] == pytest.approx(100 * math.exp(0.5), rel=0.05)  # one sigma above
    assert max(lengths.parse("lognormal:100:0.5:120", "--x").draw(chance) for _ in range(500)) == 120


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "1.5", "uniform:5:3", "uniform:1", "lognormal:64", "normal:1:2", "nan"]
)
def test_what_is_no_length_is_refused_with_the_option(text: str) -> None:
    with pytest.raises(UserError, match=r"--answer-tokens: .* is no length in tokens; write 64"):
        lengths.parse(text, "--answer-tokens")


def test_a_request_is_the_same_in_every_process_and_has_the_wished_length() -> None:
    workload = Workload(made(ignore_eos=True), WordRate(2.0, 4.0))
    asked = workload.request(3)
    body = json.loads(asked.body)
    assert len(body["messages"][0]["content"].split()) == 2  # (8 - 4) / 2
    assert body["stream_options"] == {"include_usage": True}
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"]) == (4, True, 0.0)
    assert Workload(made(), WordRate(2.0, 4.0)).request(3).body == asked.body != workload.request(4).body


def test_shared_prefixes_begin_the_prompts_and_add_their_tokens() -> None:
    own = made(prefixes=2, prefix_tokens=20, route="completions")
    asked = [Workload(own, WordRate(1.0, 5.0)).request(number) for number in range(30)]
    prompts = [json.loads(each.body)["prompt"].split() for each in asked]
    assert {len(prompt) + 5 for prompt in prompts} == {28} == {each.prompt_tokens for each in asked}
    assert len({tuple(prompt[:15]) for prompt in prompts}) == 2
    assert len({tuple(prompt[15:]) for prompt in prompts}) == 30


def test_token_ids_are_exact() -> None:
    asked = Workload(made(route="completions", token_ids=(10, 20))).request(0)
    prompt = json.loads(asked.body)["prompt"]
    assert len(prompt) == 8
    assert set(prompt) <= set(range(10, 20))


def test_turns_of_a_session_repeat_those_before_them() -> None:
    workload = Workload(made(sessions=2, turns=2))
    first, _, second, _, third = (workload.request(number) for number in range(5))
    texts = [json.loads(each.body)["messages"][0]["content"] for each in (first, second, third)]
    assert texts[1].startswith(texts[0] + " ")
    assert first.session == second.session != third.session  # a new conversation
    assert not texts[2].startswith(texts[0])


def test_the_wished_length_of_a_turn_is_that_of_all_before_it() -> None:
    own = made(sessions=1, turns=3, prefixes=1, prefix_tokens=20, route="completions")
    asked = [Workload(own, WordRate(1.0, 5.0)).request(number) for number in range(3)]
    assert [each.prompt_tokens for each in asked] == [28, 36, 44]
    assert [len(json.loads(each.body)["prompt"].split()) + 5 for each in asked] == [28, 36, 44]


def test_the_rate_of_words_is_learnt_from_two_prompts() -> None:
    rate = measured((8, 22), (40, 70))
    assert (rate.per_word, rate.beside) == (1.5, 10.0)
    assert rate.words(40) == 20
    assert rate.words(3) == 1
    assert measured((8, 9), (40, 9)) == WordRate()  # a server that counts nothing
    assert len(WORDS) == len(set(WORDS)) > 90


def test_a_file_gives_prompts_and_lengths_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "one", "max_tokens": 2}\n\n{"prompt_tokens": 3}\n{"messages": [{"role": "user"}]}\n')
    bodies = [json.loads(Workload(made(file=str(path))).request(number).body) for number in range(4)]
    assert [body["max_tokens"] for body in bodies] == [2, 4, 4, 2]
    assert bodies[0]["messages"] == [{"role": "user", "content": "one"}] == bodies[3]["messages"]
    assert len(bodies[1]["messages"][0]["content"].split()) == 3
    assert bodies[2]["messages"] == [{"role": "user"}]
    assert [Workload(made(file=str(path))).request(at).prompt_tokens for at in range(3)] == [None, 3, None]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "is no object"),
        ('{"promt": "x"}', "promt is not known"),
        ('{"prompt": "x", "prompt_tokens": 3}', "more than one of"),
        ('{"max_tokens": true}', "max_tokens is True"),
        ('{"prompt": [1, 2]}', "a prompt is a text"),
        ('{"messages": []}', "messages are a list"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, row: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "good"}\n' + row)
    with pytest.raises(UserError, match=rf"rows.jsonl:2.*{said}"):
        Workload(made(file=str(path)))


# -- options ----------------------------------------------------------------------------------------------------------


def test_only_this_machine_is_loaded_unless_asked() -> None:
    for url in ("http://127.0.0.1:1", "http://localhost:1/v1", "http://[::1]:1", "http://127.9.9.9"):
        assert settings.target(url, allow_remote=False).prefix == ""
    for url in (
        "http://10.0.0.5:8000",
        "https://api.example.com/v1",
        "http://localhost.example.com",
        "http://0.0.0.0:1",
    ):
        with pytest.raises(UserError, match="is not this machine"):
            settings.target(url, allow_remote=False)
    far = settings.target("https://api.example.com/openai/v1/", allow_remote=True)
    assert (far.host, far.port, far.prefix, far.tls) == ("api.example.com", 443, "/openai", True)
    for url in ("127.0.0.1:8000", "ftp://localhost", "http://:8000", "http://localhost:x", "http://me:pw@localhost"):
        with pytest.raises(UserError, match="--url"):
            settings.target(url, allow_remote=False)


def test_bounds_are_read_in_seconds() -> None:
    assert settings.slo("ttft=500ms,tpot=50ms, e2e=2s") == (("ttft", 0.5), ("tpot", 0.05), ("e2e", 2.0))
    assert settings.slo(None) == ()
    for text in ("ttft=500", "ttfb=5ms", "ttft=5ms,ttft=6ms", "ttft=1.2.3s", ","):
        with pytest.raises(UserError, match="--slo"):
            settings.slo(text)


def test_callers_come_from_options_a_file_or_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("big tandem-a 10\nsmall tandem-b\n")
    assert settings.callers(["one"], path, "unused") == (
        Caller("key-1", "one"),
        Caller("big", "tandem-a", 10.0),
        Caller("small", "tandem-b", 1.0),
    )
    assert settings.callers([], None, "from-outside") == (Caller("key-1", "from-outside"),)
    assert settings.callers([], None, None) == (Caller("anyone", None),)
    for text, said in (
        ("big", "keys:1 is no"),
        ("a b 0", "keys:1 is no"),
        ("a b\na c", "a is there twice"),
        ("", "no keys"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            settings.callers([], path, None)
    with pytest.raises(UserError, match="no header may have"):
        settings.callers(["a\r\nx-evil: 1"], None, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rate": 1.0}, "name one"),
        ({"users": None}, "name one"),
        ({"burstiness": 0.5}, "--burstiness is of the open loop"),
        ({"users": None, "rate": 1.0, "ramp_s": 1.0}, "--ramp is of the closed loop"),
        ({"token_ids": (1, 2)}, "--token-ids needs --route completions"),
        ({"prefixes": 2}, "need each other"),
        ({"sessions": 2, "file": "x"}, "--sessions does nothing"),
        ({"callers": (Caller("a", "a"), Caller("b", "b"))}, "fewer than the 2 keys"),
        ({"processes": 2}, "--processes 2 are more"),
        ({"stream": False, "slo": (("ttft", 1.0),)}, "without --stream"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        settings.check(made(**changes))


def test_as_many_files_as_connections_need() -> None:
    assert processes.files(936, soft=1_024, hard=math.inf) == 1_024
    assert processes.files(2_000, soft=1_024, hard=4_096) == 2_064
    with pytest.raises(
        UserError, match=r"5,000 connections in a process need 5,064 open files.*allows 4,096.*--processes"
    ):
        processes.files(5_000, soft=1_024, hard=4_096)


def test_secrets_are_in_no_result() -> None:
    told = made(callers=(Caller("a", "tandem-secret", 2.0),)).told()
    assert "tandem-secret" not in json.dumps(told)
    assert told["callers"] == [{"name": "a", "share": 2.0}]
    assert told["prompt_tokens"] == "8"


# -- figures ----------------------------------------------------------------------------------------------------------


def ended(number: int = 0, caller: str = "a", **fields: Any) -> Record:
    fields = {
        "outcome": OK,
        "first": 1.5,
        "last": 2.5,
        "ended": 3.0,
        "completion_tokens": 11,
        "prompt_tokens": 4,
        **fields,
    }
    found = Record(number, caller, intended=fields.pop("intended", 1.0), sent=fields.pop("sent", 1.25))
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def test_latencies_count_from_the_intended_beginning() -> None:
    found = ended()
    assert (found.ttft, found.tpot, found.e2e, found.tokens) == (0.5, 0.1, 2.0, 15)
    assert ended(completion_tokens=1).tpot is None
    told = figures.latencies([found], open_loop=True)
    assert (told["ttft"]["p50"], told["queue"]["max"]) == (500.0, 250.0)
    assert "queue" not in figures.latencies([found], open_loop=False)


def test_percentiles_are_linear_between_neighbours() -> None:
    told = figures.percentiles_ms(each / 1000 for each in range(101))
    assert told == {"count": 101, "mean": 50.0, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
    assert figures.percentiles_ms([]) is None


def test_fairness_indices() -> None:
    assert figures.jain([5, 5, 5]) == pytest.approx(1.0)
    assert figures.jain([9, 0, 0]) == pytest.approx(1 / 3)
    assert figures.jain([0, 0]) == 1.0
    assert figures.max_min([2, 8, 10], 12) == [2, 5, 5]
    assert figures.max_min([1, 1], 12) == [1, 1]


def test_the_open_loop_compares_with_max_min_shares() -> None:
    big = [
        ended(number, "big", asked_answer=100, prompt_tokens=0, completion_tokens=number < 30 and 100)
        for number in range(100)
    ]
    small = [ended(number, "small", asked_answer=100, prompt_tokens=0, completion_tokens=100) for number in range(10)]
    told = figures.fairness(big + small, ["big", "small"], open_loop=True)
    assert told["jain_of_max_min_shares"] == 1.0  # the small one had all that it asked for
    assert told["jain_of_tokens"] == pytest.approx(40**2 / (2 * (30**2 + 10**2)))


def test_goodput_counts_whole_answers_within_all_bounds() -> None:
    bounds = {"ttft": 0.5, "tpot": 0.1}
    assert figures.meets(ended(), bounds)
    assert not figures.meets(ended(first=1.51), bounds)
    assert not figures.meets(ended(last=2.6), bounds)
    assert not figures.meets(ended(outcome=CUT), bounds)
    assert figures.meets(ended(completion_tokens=1), bounds)
    assert not figures.meets(ended(completion_tokens=None), bounds), "nobody knows its time per token"
    assert figures.meets(ended(completion_tokens=None), {"ttft": 0.5})
    nothing = ended(completion_tokens=0, first=None, last=None, ended=1.4)
    assert figures.meets(nothing, bounds)
    assert not figures.meets(nothing, {"ttft": 0.3})


def test_one_that_takes_long_at_the_end_changes_no_rate() -> None:
    """A request a second for 60 s, each answered within a second, and one that hangs until it is cut off."""
    even = [ended(at, intended=float(at), sent=float(at), ended=at + 0.5) for at in range(60)]
    hangs = ended(60, intended=58.5, sent=58.5, ended=90.0, outcome=UNFINISHED, completion_tokens=None)
    alone, both = (figures.summary(records, {"e2e": 1.0}, open_loop=True) for records in (even, [*even, hangs]))
    assert (alone["sending_s"], alone["drain_s"]) == (59.0, 0.5)
    assert (both["sending_s"], both["drain_s"], both["duration_s"]) == (59.0, 31.0, 90.0)
    for told in (alone, both):
        assert told["rates"]["requests_per_second"] == 1.0  # the last one began as the window ended: none of it is in
        assert told["rates"]["completion_tokens_per_second"] == 11.0
        assert told["slo"]["goodput_requests_per_second"] == 1.0
        assert told["rates"]["completion_tokens"] == 660
    assert both["rates_with_drain"]["requests_per_second"] == pytest.approx(60 / 90, abs=1e-3)


def test_the_closed_loops_load_grows_less_when_a_user_has_no_next_request() -> None:
    records = [ended(at, intended=0.0, sent=0.0, ended=2.0 + at / 2) for at in range(3)]
    told = figures.summary(records, {}, open_loop=False)
    assert (told["sending_s"], told["drain_s"]) == (2.0, 1.0)
    tokens = 11 * (1 + 2 / 2.5 + 2 / 3)  # of the two others what they had of their time
    assert told["rates"]["completion_tokens_per_second"] == pytest.approx(tokens / 2, abs=0.05)
    assert figures.summary([], {}, open_loop=False)["rates"]["requests_per_second"] == 0


def test_shares_compare_what_is_known_to_have_been_asked() -> None:
    """Equal service at 10:1 of the load is fair, whether or not the length of prompts is known."""
    for asked in (1_000, None):
        served = [
            ended(at, who, asked_prompt=asked, asked_answer=20, prompt_tokens=1_000, completion_tokens=20)
            for who in ("big", "small")
            for at in range(100)
        ]
        refused = [
            ended(at, "big", outcome=RATE_LIMITED, asked_prompt=asked, asked_answer=20, prompt_tokens=None,
                  completion_tokens=None)
            for at in range(900)
        ]  # fmt: skip
        told = figures.fairness([*served, *refused], ["big", "small"], open_loop=True)
        assert told["jain_of_max_min_shares"] == 1.0
        assert told["shares_are_of"] == ("tokens" if asked else "tokens of answers")


def test_a_summary_counts_by_what_became_of_requests() -> None:
    records = [
        ended(0, gaps=array("f", [0.1, 0.9])),
        ended(1, outcome=CUT, detail="gone", completion_tokens=None),
        ended(2, outcome=RATE_LIMITED, detail="busy", first=None, completion_tokens=None, prompt_tokens=None),
        ended(3, outcome="http 500", intended=0.0, ended=4.0),
        ended(4, completion_tokens=None),
    ]
    told = figures.summary(records, {"e2e": 2.0}, open_loop=False)
    counted = told["requests"]
    assert (counted["sent"], counted["completed"], counted["rejected_429"], counted["cut_streams"]) == (5, 2, 1, 1)
    assert counted["failed_otherwise"] == {"http 500": 1}
    assert counted["said"] == {CUT: "gone", RATE_LIMITED: "busy"}
    assert told["duration_s"] == 4.0
    assert (told["sending_s"], told["drain_s"]) == (3.0, 1.0)
    assert told["rates"]["completion_tokens_per_second"] == pytest.approx((11 + 11 * 1.75 / 2.75) / 3, abs=0.05)
    assert told["rates_with_drain"]["completion_tokens_per_second"] == 22 / 4
    assert told["rates"]["answers_without_usage"] == 1
    assert told["longest_gap_ms"] == pytest.approx(900, abs=0.01)
    assert told["slo"]["met"] == 2
    assert told["slo"]["goodput_requests_per_second"] == pytest.approx(2 / 3, abs=1e-3)
    assert "callers" not in told


def test_what_happens_in_a_second() -> None:
    middles, rates = plot.per_second([0.1, 0.2, 5.9], [1, 1, 4], end=6.0)
    assert (rates[1], rates[2], rates[-1]) == (10, 10, 40)
    assert middles[0] == pytest.approx(0.05)


# -- answers ----------------------------------------------------------------------------------------------------------


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def delta(text: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})


OPENING = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
USAGE = event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}})


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_stream_is_read_however_it_is_cut(size: int, newline: bytes) -> None:
    texts = delta("a"), b": a comment\n\n", delta('"usage": {'), delta("c")
    whole = b"".join([OPENING, *texts, USAGE, b"data: [DONE]\n\n"]).replace(b"\n", newline)
    answer = StreamedAnswer()
    for at in range(0, len(whole), size):
        answer.feed(whole[at : at + size], now=float(at))
    assert (answer.events, answer.usage["completion_tokens"], answer.whole, answer.error) == (3, 3, True, None)
    assert answer.first is not None
    if size == 1:
        assert answer.first == len((OPENING + texts[0]).replace(b"\n", newline)) - 1
        assert len(answer.gaps) == 2


def test_the_first_text_is_no_role_and_gaps_are_between_arrivals() -> None:
    answer = StreamedAnswer()
    for data, now in ((OPENING, 1.0), (delta("a"), 2.0), (delta("b") + delta("c"), 2.5), (delta("d"), 4.0)):
        answer.feed(data, now)
    assert (answer.first, answer.last, list(answer.gaps), answer.events) == (2.0, 4.0, [0.5, 1.5], 4)
    assert not answer.whole


def test_an_error_in_a_stream_is_not_a_whole_answer() -> None:
    answer = StreamedAnswer()
    answer.feed(delta("a") + event({"error": {"message": "gone", "code": 500}}) + b"data: [DONE]\n\n", 1.0)
    assert (answer.error, answer.whole, answer.events) == ("gone", False, 1)
    nonsense = StreamedAnswer()
    nonsense.feed(b"data: {\n\n", 1.0)
    assert not nonsense.whole
    assert "no JSON" in str(nonsense.error)


def test_answers_in_one_piece() -> None:
    good, bad, text = WholeAnswer(), WholeAnswer(), WholeAnswer()
    for answer, body in (
        (good, b'{"usage": {"prompt_tokens": 3}}'),
        (bad, b'{"error": {"message": "no"}}'),
        (text, b"Bad"),
    ):
        answer.feed(body, 1.0)
        answer.end()
    assert (good.whole, good.usage, good.error) == (True, {"prompt_tokens": 3}, None)
    assert (bad.whole, bad.error) == (False, "no")
    assert (text.whole, text.error) == (False, "Bad")
