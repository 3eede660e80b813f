"""Whole examples are held out, copies on one side; only a single text, or a few long ones, are cut."""

import numpy as np
import pytest

from cluster.errors import UserError
from jobs.data import splitting, stream
from jobs.data.examples import BadRows, Example, Source
from jobs.data.said import said_of_content, said_of_split
from jobs.spec import DataSpec
from jobs.tasks import get


def apart(examples: list[dict], task: str = "causal-lm", **data) -> tuple[list[dict], list[dict], list[str]]:
    """Return what is trained on, what is held out, and what is said."""
    reading = stream.Stream(Source("x", "", lambda: (Example(e) for e in examples)), get(task)())
    settings = DataSpec.model_validate(data)
    survey = reading.survey(BadRows(most=9))
    division = stream.division_of(survey, settings)
    found = list(stream.divided(reading, survey, division))
    sides = ([dict(e) for s, e in found if s == side] for side in ("train", "eval"))
    return *sides, said_of_split(survey, settings, 0 if division.held is None else int(division.held.sum()))


def texts(*values: str) -> list[dict]:
    return [{"text": value} for value in values]


def test_few_short_texts_are_held_out_whole():
    rows = texts(*(f"The capital of land {n} is Town{n}." for n in range(12)))
    train, held, said = apart(rows, eval_fraction=0.1)
    assert (len(train), len(held)) == (11, 1)
    assert [row for row in rows if row not in train + held] == []
    assert said == ["1 of 12 examples are held out, whole"]


def test_rows_that_are_conversations_are_not_cut_by_a_text_beside():
    rows = [{"instruction": f"Name {n}.", "output": f"It is {n}.", "text": f"Name {n}. It is {n}."} for n in range(12)]
    train, held, _ = apart(rows, eval_fraction=0.25)
    assert (len(train), len(held)) == (9, 3)
    assert not any(row in train for row in held)


def test_a_single_text_and_a_few_long_ones_are_cut():
    train, held, said = apart(texts("0123456789"), eval_fraction=0.2)
    assert (train, held) == (texts("01234567"), texts("89"))
    assert said == ["the text is cut: the last 20% is held out"]
    books = texts("a" * 30_000, "b" * 20_000)
    train, held, said = apart(books, eval_fraction=0.1)
    assert [len(row["text"]) for row in train + held] == [27_000, 18_000, 3_000, 2_000]
    assert "the 2 texts are each cut" in said[0]
    assert len(apart([*books, *texts("short")], eval_fraction=0.3)[1]) == 1, "not all of them are long"


def test_a_text_too_short_to_be_cut_is_refused():
    with pytest.raises(UserError, match=r"too short to hold 0\.2 of it out; set data\.eval_fraction: 0"):
        apart(texts("a"), eval_fraction=0.2)


@pytest.mark.parametrize("seed", range(20))
def test_copies_lie_on_one_side(seed):
    rows = [{"text": f"text {n // 3}", "id": n} for n in range(90)]
    train, held, said = apart(rows, eval_fraction=0.2, split_seed=seed)
    assert len(held) == 18
    assert not {row["text"] for row in train} & {row["text"] for row in held}
    assert "60 of 90 examples are copies of an earlier one, and are kept on its side of the split" in said


@pytest.mark.parametrize("seed", range(20))
def test_a_text_that_most_rows_are_copies_of_does_not_take_the_held_out_share(seed):
    rows = texts(*["the same"] * 90, *(f"other {n}" for n in range(30)))
    _, held, _ = apart(rows, eval_fraction=0.1, split_seed=seed)
    assert len(held) == 12
    assert texts("the same")[0] not in held


def test_groups_of_copies_larger_than_the_share_leave_the_smallest():
    train, held, _ = apart(texts(*["a"] * 5, *["b"] * 4), eval_fraction=0.1)
    assert (train, held) == (texts(*"aaaaa"), texts(*"bbbb"))


def test_one_example_is_trained_on_unless_a_share_was_asked_for():
    turns = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]
    rows = [{"messages": turns}] * 3
    assert apart(rows)[1:] == ([], ["nothing is held out: there is 1 example, many times over"])
    with pytest.raises(UserError, match=r"leaves nothing of 3 example\(s\) \(1 different\) to train on"):
        apart(rows, eval_fraction=0.1)


def test_the_label_does_not_tell_copies_apart():
    rows = [{"text": f"text {n // 2}", "label": "ab"[n % 2]} for n in range(40)]
    train, held, _ = apart(rows, "text-classification", eval_fraction=0.2)
    assert not {row["text"] for row in train} & {row["text"] for row in held}


def test_what_is_told_apart_is_the_whole_content():
    values = ["1", 1, 1.0, True, None, b"1", ["1"], {"1": 1}, ["1", "1"], [["1"], "1"], np.array([1]), np.array([[1]])]
    hashes = [splitting.content_of(value) for value in [*values, "11", ["11"]]]
    assert len(set(hashes)) == len(hashes)
    assert splitting.content_of({"a": ["x", 1]}) == splitting.content_of({"a": ["x", 1]})


def test_a_source_that_changes_while_it_is_read_is_refused():
    rows = texts(*(f"text {n}" for n in range(30)))
    reading = stream.Stream(Source("x", "", lambda: (Example(e) for e in rows)), get("causal-lm")())
    survey = reading.survey(BadRows())
    rows.append({"text": "appended"})
    with pytest.raises(UserError, match="x has changed while it was read"):
        list(stream.divided(reading, survey, stream.division_of(survey, DataSpec(eval_fraction=0.1))))


def test_copies_that_differ_in_white_space_only_lie_on_one_side():
    spaced = ["a b", "a  b", " a b\n", "a\u00a0b"]
    assert len({splitting.content_of(text) for text in spaced}) == 1
    assert len({splitting.content_of([{"role": "user", "content": text}]) for text in spaced}) == 1
    assert splitting.content_of("a b") != splitting.content_of("ab")


def test_copies_with_another_label_are_said():
    rows = [{"text": text, "label": label} for text, label in ("ax", "ay", "ay", "bx", "bx", "by", "bz", "cx")]
    reading = stream.Stream(Source("x", "", lambda: (Example(row) for row in rows)), get("text-classification")())
    said = said_of_content(reading.survey(BadRows()))
    assert said == ["3 of 8 examples are copies of an earlier one with another target"]
    rows[:] = [{"text": "a", "label": 1}, {"text": "a", "label": "1"}, {"text": "b", "label": 2}]
    assert said_of_content(reading.survey(BadRows())) == []
