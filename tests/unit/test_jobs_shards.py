"""State written by a group of any shape is read by a group of any other."""

import pytest
import torch

from jobs.checkpoint import shards
from jobs.checkpoint.shards import KINDS, Fragment, Reader, ShardError
from jobs.checkpoint.store import Store

SIZES = {"embed.weight": 40, "layer.0.weight": 30, "layer.0.bias": 3, "head": 1}


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    return {name: {kind: torch.randn(size, generator=generator) for kind in KINDS} for name, size in SIZES.items()}


def whole(state) -> list[Fragment]:
    return [Fragment(name, 0, tensors) for name, tensors in state.items()]


def by_parameter(state, world_size: int) -> list[list[Fragment]]:
    """As ZeRO-3: every parameter in equal parts, rounded up."""
    ranks: list[list[Fragment]] = [[] for _ in range(world_size)]
    for name, tensors in state.items():
        part = -(-SIZES[name] // world_size)
        for rank in range(world_size):
            views = {kind: tensor[rank * part : (rank + 1) * part] for kind, tensor in tensors.items()}
            if len(views["weight"]):
                ranks[rank].append(Fragment(name, rank * part, views))
    return ranks


def by_group(state, world_size: int) -> list[list[Fragment]]:
    """As ZeRO-1 and 2: the concatenation in equal parts."""
    return [shards.share(whole(state), rank, world_size) for rank in range(world_size)]


def write(store: Store, groups: list[list[Fragment]]) -> list[str]:
    names = []
    for rank, fragments in enumerate(groups):
        buffer = torch.empty(shards.total_elements(fragments))
        shards.copy_out(fragments, buffer)
        names.append(f"step/{rank}.safetensors")
        store.write(names[-1], [shards.header(fragments), buffer.numpy()])
    return names


@pytest.mark.parametrize("writers", [1, 2, 3, 7])
@pytest.mark.parametrize("cut", [by_parameter, by_group])
def test_every_element_is_found_again_by_any_other_group(state, tmp_path, cut, writers):
    store = Store(str(tmp_path))
    reader = Reader(store, write(store, cut(state, writers)))
    for other in (by_parameter, by_group):
        for readers in (1, 2, 5):
            for fragment in (f for group in other(state, readers) for f in group):
                for kind, expected in fragment.tensors.items():
                    got = torch.zeros_like(expected)
                    reader.read(kind, fragment.parameter, fragment.start, got)
                    assert torch.equal(got, expected)


def test_a_share_is_disjoint_and_complete(state):
    seen = {name: torch.zeros(size) for name, size in SIZES.items()}
    for rank in range(5):
        for fragment in shards.share(whole(state), rank, 5):
            seen[fragment.parameter][fragment.start : fragment.start + fragment.numel] += 1
    assert all(bool((count == 1).all()) for count in seen.values())


def test_a_shard_is_a_safetensors_file(state, tmp_path):
    from safetensors.torch import load_file

    store = Store(str(tmp_path))
    (name,) = write(store, [whole(state)])
    found = load_file(tmp_path / name)
    assert torch.equal(found["exp_avg|layer.0.weight|0"], state["layer.0.weight"]["exp_avg"])


def test_what_is_missing_is_named(state, tmp_path):
    store = Store(str(tmp_path))
    reader = Reader(store, write(store, by_group(state, 3))[:2])
    with pytest.raises(ShardError, match=r"weight of 'layer.0.weight': elements \d+ to 30 are in no shard"):
        reader.read("weight", "layer.0.weight", 0, torch.zeros(30))
    with pytest.raises(ShardError, match="weight of 'unknown': elements 0 to 1"):
        reader.read("weight", "unknown", 0, torch.zeros(1))


def test_another_type_of_number_is_refused(tmp_path):
    from safetensors.torch import save

    store = Store(str(tmp_path))
    store.write("x/y.safetensors", [save({"weight|a|0": torch.zeros(2, dtype=torch.float64)})])
    with pytest.raises(ShardError, match="is no fp32"):
        Reader(store, ["x/y.safetensors"])


def test_what_muon_trains_has_a_momentum_and_nothing_of_adamw(tmp_path):
    store, ones = Store(str(tmp_path)), torch.ones(4)
    by_muon = Fragment("a", 0, {"weight": ones, "momentum": ones})
    reader = Reader(store, write(store, [[by_muon, Fragment("b", 0, dict.fromkeys(KINDS, ones))]]))
    reader.check_whole({"a": 4, "b": 4})
    assert [reader.kinds(name) for name in "ab"] == [("weight", "momentum"), KINDS]
    half = Fragment("a", 2, {"weight": ones[:2]})
    first = Fragment("a", 0, {"weight": ones[:2], "momentum": ones[:2]})
    with pytest.raises(ShardError, match="momentum of 'a' has 4 elements, of which 2 to 4 are in no shard"):
        Reader(store, write(store, [[first, half]])).check_whole({"a": 4})
    both = Fragment("a", 0, {"weight": ones, "momentum": ones, "exp_avg": ones})
    with pytest.raises(ShardError, match="'a' has exp_avg and momentum"):
        Reader(store, write(store, [[both]])).check_whole({"a": 4})
