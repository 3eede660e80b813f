"""Pairs kept aside have neighbouring words that no other source has side by side, and words that others have."""

from collections import Counter
from itertools import product

from tools.pairs_aside import LEAST, cut, neighbours, words

PAIRS = [(f"{a} {b} {c}.", f"{n}") for n, (a, b, c) in enumerate(product("pqr", "stu", "vwx"))]
TWICE = [*PAIRS, *((source, "another") for source, _ in PAIRS[::2])]


def test_a_combination_that_is_kept_aside_is_nowhere_else():
    rest, aside = cut(TWICE, 6)
    assert sorted(rest + aside) == sorted(TWICE)
    assert len(aside) >= 6
    seen = set().union(*(neighbours(source) for source, _ in rest))
    assert all(neighbours(source) - seen for source, _ in aside)
    assert not {source for source, _ in rest} & {source for source, _ in aside}


def test_every_word_stays_in_other_sources():
    rest, aside = cut(TWICE, 10_000)
    left = Counter(word for source in {source for source, _ in rest} for word in set(words(source)))
    assert aside
    assert all(left[word] >= LEAST for source, _ in aside for word in words(source))


def test_the_seed_decides():
    assert cut(TWICE, 6) == cut(TWICE, 6)
    assert cut(TWICE, 6) != cut(TWICE, 6, seed=1)
