"""Exact batches: every row once an epoch, the same rows a step, at any number of workers."""

import tracemalloc

import numpy as np
import pytest

from jobs.data import batches


def test_an_epoch_visits_every_row_once():
    order = batches.Order(rows=10, seed=3)
    visited = np.concatenate([order.take(s * 4, 4) for s in range(5)])
    assert sorted(visited[:10]) == sorted(visited[10:]) == list(range(10))
    assert list(visited[:10]) != list(visited[10:])


def test_order_depends_on_the_seed_alone():
    assert np.array_equal(batches.Order(50, 1).take(30, 40), batches.Order(50, 1).take(30, 40))
    assert not np.array_equal(batches.Order(50, 1).take(0, 50), batches.Order(50, 2).take(0, 50))


def test_a_resume_continues_in_the_middle_of_a_step_across_epochs():
    whole = batches.Order(7, 0).take(0, 30)
    assert np.array_equal(np.concatenate([batches.Order(7, 0).take(0, 11), batches.Order(7, 0).take(11, 19)]), whole)


def test_of_very_many_rows_an_epoch_visits_each_once_without_a_list():
    rows = batches.LISTED_ROWS + 5
    order = batches.Order(rows, seed=3)
    assert np.array_equal(np.sort(order.take(rows, rows)), np.arange(rows))
    tracemalloc.start()
    visited = batches.Order(2**39, seed=3).take(2**39 - 2048, 4096)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert len(np.unique(visited)) == 4096
    assert np.array_equal(visited[2048:], batches.Order(2**39, seed=3).take(2**39, 2048))


@pytest.mark.parametrize(
    ("rows", "version"), [(50, 1), (50, 2), (batches.LISTED_ROWS, 2), (batches.LISTED_ROWS + 1, 1)]
)
def test_few_rows_and_the_first_version_are_in_the_order_that_they_were_in(rows, version):
    drawn = [np.random.Generator(np.random.PCG64(np.random.SeedSequence([9, e]))).permutation(rows) for e in (0, 1)]
    taken = batches.Order(rows, 9, version).take(rows - 20, 40)
    assert np.array_equal(taken, np.concatenate([drawn[0][-20:], drawn[1][:20]]))


def test_the_versions_differ_above():
    rows = batches.LISTED_ROWS + 1
    assert not np.array_equal(batches.Order(rows, 9, 1).take(0, 40), batches.Order(rows, 9, 2).take(0, 40))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_ranks_share_a_step_without_loss_or_repeat(world_size, micro_batch):
    rows = batches.Order(100, 0).take(0, 13)
    shares = [batches.share(rows, rank, world_size, micro_batch) for rank in range(world_size)]
    assert sorted(np.concatenate([part for share in shares for part in share])) == sorted(rows)
    assert len({len(share) for share in shares}) == 1, "every rank takes part in every backward pass"
    assert all(len(part) <= micro_batch for share in shares for part in share)
    assert len(shares[0]) == batches.accumulation_steps(13, world_size, micro_batch)


@pytest.mark.parametrize(
    ("wanted", "global_batch", "world_size", "expected"),
    [(None, 64, 2, 16), (None, 7, 2, 4), (8, 64, 4, 8), (8, 4, 4, 1)],
)
def test_micro_batch_size(wanted, global_batch, world_size, expected):
    assert batches.micro_batch_size(wanted, global_batch, world_size) == expected
