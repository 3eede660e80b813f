"""A permutation without a list: each row once, in any slices, even over places and pairs, another one each epoch."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import chi2

from jobs.data.permutation import MOST_ROWS, keyed

PRIMES = (307, 997, 7_919, 65_537, 104_729, 1_299_709)
AROUND_POWERS = tuple(2**power + by for power in range(9, 21) for by in (-1, 0, 1))


def probability(found: np.ndarray, expected: np.ndarray | float) -> float:
    """Return how likely counts at least as uneven as these are by chance."""
    statistic = ((found - expected) ** 2 / expected).sum()
    return float(chi2.sf(statistic, found.size - 1))


@pytest.mark.parametrize("sizes", [range(1, 301), PRIMES, AROUND_POWERS], ids=["small", "primes", "powers"])
def test_each_row_comes_once(sizes):
    for size in sizes:
        found = keyed(size, 7, size).at(np.arange(size))
        assert np.array_equal(np.sort(found), np.arange(size)), size


@pytest.mark.parametrize("size", [2**31 + 1, 10**12, MOST_ROWS])
def test_no_row_comes_twice_of_very_many(size):
    places = np.concatenate([np.arange(100_000), np.arange(size - 100_000, size)])
    found = keyed(size, 1, 0).at(places)
    assert len(np.unique(found)) == len(places)
    assert 0 <= found.min() < size // 1000
    assert size - size // 1000 < found.max() < size


@pytest.mark.parametrize("size", [10, 100_003])
def test_slices_and_single_places_are_those_of_the_whole(size):
    permuted = keyed(size, 2, 3)
    whole = permuted.at(np.arange(size))
    edges = sorted({0, size, *np.random.Generator(np.random.PCG64(1)).integers(0, size, 20).tolist()})
    parts = [permuted.at(np.arange(start, end)) for start, end in pairwise(edges)]
    assert np.array_equal(np.concatenate(parts), whole)
    backwards = np.arange(size)[::-1]
    assert np.array_equal(permuted.at(backwards), whole[::-1])
    for place in range(0, size, size // 5):
        assert permuted.at(np.array([place])).tolist() == [whole[place]]
    assert len(permuted.at(np.zeros(0, dtype=np.int64))) == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [100_003, 2**20 + 1])
def test_places_and_neighbours_are_even(seed, size):
    """Over 64 parts of the places and of the rows, and of the rows and of the way from a row to the next one."""
    parts, found = 64, keyed(size, seed, 0).at(np.arange(size))
    edges = np.bincount(np.arange(size) * parts // size, minlength=parts)
    cells = (np.arange(size) * parts // size) * parts + found * parts // size
    assert 1e-4 < probability(np.bincount(cells, minlength=parts**2), np.outer(edges, edges).ravel() / size) < 1 - 1e-4
    ways = (found[1:] - found[:-1]) % size
    by_way = np.bincount(np.arange(1, size) * parts // size, minlength=parts)
    cells = (found[:-1] * parts // size) * parts + ways * parts // size
    assert probability(np.bincount(cells, minlength=parts**2), np.outer(edges, by_way).ravel() / size) > 1e-4
    steps = int((ways == 1).sum()) + int((ways == size - 1).sum())
    assert steps < 15, "two neighbours in a row and no more, on average, are neighbours among the rows"


@pytest.mark.parametrize("size", [3, 10, 30])
def test_every_row_comes_at_every_place_as_often(size):
    """Over 3,000 epochs of a few rows, where the least could be hidden."""
    epochs = np.array([keyed(size, 11, epoch).at(np.arange(size)) for epoch in range(3000)])
    at = [np.bincount(epochs[:, place], minlength=size) for place in range(size)]
    assert probability(np.array(at), 3000 / size) > 1e-4
    together = np.bincount(epochs[:, 0] * size + epochs[:, 1], minlength=size**2).reshape(size, size)
    assert together.trace() == 0
    assert probability(together[~np.eye(size, dtype=bool)], 3000 / size / (size - 1)) > 1e-4


def test_epochs_and_seeds_know_nothing_of_each_other():
    size, parts = 2**20 + 7, 64
    orders = [keyed(size, *words).at(np.arange(size)) for words in ((0, 0), (0, 1), (1, 0), (2**32, 0))]
    edges = np.bincount(np.arange(size) * parts // size, minlength=parts)
    for one, other in [(0, 1), (0, 2), (1, 2), (1, 3)]:
        cells = (orders[one] * parts // size) * parts + orders[other] * parts // size
        assert probability(np.bincount(cells, minlength=parts**2), np.outer(edges, edges).ravel() / size) > 1e-4
        assert (orders[one] == orders[other]).sum() < 10, "one row on average has the place that it had"


def test_what_is_drawn_stays_what_it_is():
    """A run that goes on later, with another Tandem or numpy, goes on in the same order."""
    drawn = {
        1_000: [978, 866, 871],
        2**20 + 1: [537578, 871729, 427613],
        2**31: [579825354, 1309340005, 1728152885],
        MOST_ROWS: [155053096136, 337631620704, 455520029847],
    }
    assert {size: keyed(size, 5, 2).at(np.array([0, 1, size - 1])).tolist() for size in drawn} == drawn
