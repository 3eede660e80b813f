"""When a checkpoint is copied, and when the state itself is written: by the memory that its machines have left."""

from dataclasses import replace

import torch

from cluster import memory
from jobs.worker import save_room
from jobs.worker.save_room import Room

GIB = 1 << 30
ROOM = Room("a", copy=10 * GIB, held=0, growth=2 * GIB, available=30 * GIB, total=100 * GIB)


def test_a_copy_is_made_where_it_fits_beside_what_the_next_step_takes_and_ray_wants_free() -> None:
    assert save_room.shortage([replace(ROOM, available=18 * GIB)]) is None
    short = save_room.shortage([replace(ROOM, available=18 * GIB - 1)])
    assert short is not None
    assert (short.node, short.copy, short.room) == ("a", 10 * GIB, 10 * GIB - 1)


def test_the_ranks_of_a_machine_share_its_memory() -> None:
    assert save_room.shortage([ROOM, ROOM]) is None
    assert save_room.shortage([ROOM, ROOM, ROOM]) == save_room.Shortage("a", 30 * GIB, 18 * GIB)
    assert save_room.shortage([ROOM, replace(ROOM, node="b"), replace(ROOM, node="c")]) is None


def test_one_machine_without_room_is_enough_and_is_named() -> None:
    short = save_room.shortage([ROOM, replace(ROOM, node="b", available=8 * GIB)])
    assert short is not None
    assert "the next update waits for that: on the node b a copy of 10.0 GiB has 0.0 GiB of room" in short.said()


def test_memory_that_a_rank_has_for_the_copy_already_is_room() -> None:
    held = replace(ROOM, held=10 * GIB, available=8 * GIB)
    assert save_room.shortage([held]) is None
    assert save_room.shortage([replace(held, available=7 * GIB)]) is not None, "the rest has grown meanwhile"


def test_a_small_copy_is_always_made() -> None:
    assert save_room.shortage([replace(ROOM, copy=save_room.ALWAYS, available=0)]) is None
    assert save_room.shortage([replace(ROOM, copy=save_room.ALWAYS + 1, available=0)]) is not None


def test_the_figures_are_those_of_this_machine() -> None:
    before = save_room.look(5, 3)
    kept = torch.ones(64 << 20)  # 256 MiB
    after = save_room.look(5, 3)
    assert (before.copy, before.held) == (5, 3)
    assert 0 < after.available < after.total == memory.of_node().total, "with the control groups' limits"
    del kept
    assert save_room.look(5, 3).growth >= after.growth + (200 << 20)
