"""The search for the largest micro-batch: it finds it, tries nothing that might not fit, and takes few trials."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from jobs.worker import remembered, rows_search
from jobs.worker.rows_search import Known, Took


def need(held: int, floor: int, fixed: int, each: int) -> Callable[[int], Took]:
    """Return what passes take: `fixed` and `each` row above what is held, or `floor` when the rows' part is gone."""
    return lambda rows: Took(held, held + 3 * each * rows // 4, held + max(floor, fixed + each * rows))


def searched(
    known: Known, took: Callable[[int], Took], tried: dict[int, Took | None] | None = None
) -> tuple[int, dict[int, Took | None], list[int]]:
    """Return what is found, all that was tried by then, and what was tried for it."""
    all_tried, trials = dict(tried or {}), list[int]()
    while (rows := rows_search.following(all_tried, known)) is not None:
        assert rows not in all_tried
        trials.append(rows)
        all_tried[rows] = took(rows)
    return rows_search.even(rows_search.best(all_tried, known.budget), known.of), all_tried, trials


def largest(known: Known, took: Callable[[int], Took]) -> int:
    sizes = {rows_search.even(rows, known.of) for rows in range(1, known.of + 1)}
    return max((rows for rows in sizes if took(rows).peak <= known.budget), default=1)


CASES = list(
    itertools.product(
        (1_000, 50_000),  # the budget
        (0, 500, 990),  # what is held
        (0, 300),  # what comes when the rows' part is gone
        (0, 5, 200),  # what is fixed besides
        (1, 37, 300, 2_000),  # what a row takes
        (0, 1, 5, 1000),  # what the plan expects
    )
)


@pytest.mark.parametrize("of", [1, 2, 3, 7, 32, 100, 1000])
def test_nearly_the_largest_is_found_and_nothing_is_tried_that_does_not_fit(of: int) -> None:
    for budget, held, floor, fixed, each, planned in CASES:
        known, took = Known(of, budget, planned), need(held, floor, fixed, each)
        found, _, trials = searched(known, took)
        case = (known, held, floor, fixed, each)
        assert all(took(rows).peak <= budget for rows in trials if rows > 1), case
        assert len(trials) <= of.bit_length() + 2, case
        most = largest(known, took)
        least = most if fixed == floor == 0 else rows_search.even(max(1, 2 * most // 3), of)
        assert least <= found <= most, case


def test_a_plan_saves_trials_and_a_wrong_one_costs_no_rows() -> None:
    took = need(100, 0, 0, 10)
    plain, led, astray = (searched(Known(256, 2_000, planned), took) for planned in (0, 128, 9))
    assert plain[0] == led[0] == astray[0] == 128
    assert plain[2] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert led[2] == [1, 2, 16, 128], "never more than so many times the rows before"
    assert searched(Known(256, 700, 128), took)[0] == 52, "five passes: what is sure limits what is planned"


def test_a_peak_of_another_moment_does_not_stand_for_the_rows() -> None:
    """Sums of gradients take 600 with one row or with ten; by their share two rows might have taken 1,200."""
    known, took = Known(10, 1_000), need(0, 600, 0, 50)
    assert rows_search.sure(1, {1: took(1)}, known) == 1 + 400 // 75
    assert searched(known, took)[0] == 10
    again = Known(10, 1_000, again=True)
    assert searched(again, took)[0] == 1, "the forward pass keeps too little to tell"
    assert searched(Known(10, 1_000, each=50, again=True), took)[0] == 10, "the plan tells"


def test_what_is_remembered_need_not_be_tried_again() -> None:
    took = need(100, 0, 0, 10)
    found, tried, _ = searched(Known(256, 2_000), took)
    assert searched(Known(256, 2_000), took, tried)[::2] == (found, [])
    assert searched(Known(256, 2_100), took, tried)[::2] == (found, []), "somewhat more is free"
    more, _, trials = searched(Known(512, 2_000), took, tried)
    assert more == largest(Known(512, 2_000), took), "another batch"
    assert len(trials) <= 2
    fewer, _, trials = searched(Known(256, 1_000), took, tried)
    assert fewer == largest(Known(256, 1_000), took)
    assert len(trials) <= 3


def test_between_what_fits_and_what_does_not() -> None:
    """As where a failure has shown that eight rows are too many, though trials promised more."""
    took = need(0, 0, 0, 4)
    found, _, trials = searched(Known(12, 10_000), took, {1: took(1), 2: took(2), 8: None})
    assert found == 6, "7 and 6 take two passes"
    assert trials
    assert max(trials) < 8


def test_where_not_even_one_row_fits_it_is_one() -> None:
    assert searched(Known(8, 10), need(90, 0, 9, 1))[::2] == (1, [1])
    assert searched(Known(8, 10), need(0, 0, 0, 1), {1: None})[::2] == (1, [])
    assert searched(Known(8, -5), need(0, 0, 0, 0))[::2] == (1, [1])


def test_sizes_divide_the_rows_evenly() -> None:
    assert [rows_search.even(rows, 32) for rows in (1, 5, 20, 31, 32, 99)] == [1, 5, 16, 16, 32, 32]
    for of, rows in itertools.product((1, 7, 30), range(1, 31)):
        even = rows_search.even(rows, of)
        assert even <= rows
        assert -(-of // even) == -(-of // min(rows, of)), "as many passes"


def test_what_a_plan_expects() -> None:
    assert rows_search.expected(lambda rows: 100 + 10 * rows, 1_000, 64) == 64
    assert rows_search.expected(lambda rows: 100 + 10 * rows, 500, 64) == 32, "40 would take as many passes"
    assert rows_search.expected(lambda rows: 100 + 10 * rows, 50, 64) == 0


def test_memory_of_trials_is_kept_and_a_damaged_one_is_none(tmp_path) -> None:
    place = tmp_path / "a" / "x.json"
    assert remembered.read(place) == {}
    remembered.write(place, {16: None, 2: Took(3, 4, 5)})
    assert remembered.read(place) == {2: Took(3, 4, 5), 16: None}
    remembered.too_many(place, 2)
    assert remembered.read(place) == {2: None, 16: None}
    for damaged in ("{", '{"a": [1, 2, 3]}', '{"2": 7}', '{"2": [1, 2]}', '{"2": ["x", 1, 2]}'):
        place.write_text(damaged)
        assert remembered.read(place) == {}
    assert remembered.digest({"a": 1, "b": 2}) == remembered.digest({"b": 2, "a": 1}) != remembered.digest({"a": 2})
