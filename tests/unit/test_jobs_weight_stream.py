"""Weights written as they come (jobs/worker/weight_stream.py): files that transformers loads, and that are checked."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.worker.recorded import record
from jobs.worker.weight_files import INDEX, SINGLE, WeightFiles
from jobs.worker.weight_match import Match, match, saved_as
from jobs.worker.weight_stream import Folder, Shard, Stored, header, in_order, plan, verify, write_index, write_one

CAUSAL, TEXT = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
SEQ, IMAGE = "AutoModelForSeq2SeqLM", "AutoModelForImageClassification"
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40}
BART |= {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("attention_heads", "ffn_dim")}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_channels": 1}
WRITTEN: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", CAUSAL, SMALL),
    ("llama", CAUSAL, {**SMALL, "tie_word_embeddings": True}),
    ("gpt2", CAUSAL, {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40}),
    ("lstm", CAUSAL, {"vocab_size": 40, "hidden_size": 16}),
    ("bert", TEXT, SMALL),
    ("t5", SEQ, T5),
    ("bart", SEQ, BART),
    ("vit", IMAGE, {**SMALL, "image_size": 16, "patch_size": 8}),
    ("resnet", IMAGE, RESNET),
]
NAMES = [f"{kind}-tied" if config.get("tie_word_embeddings") else kind for kind, _, config in WRITTEN]


def built(kind: str, source: str, config: dict[str, Any]) -> Any:
    import transformers

    from jobs.tasks import lstm

    lstm.register()
    return getattr(transformers, source).from_config(transformers.AutoConfig.for_model(kind, **config))


def write(directory: Path, shards: list[Shard], blocks: Any) -> dict[str, str]:
    """Write all files, and return their digests by name."""
    digests = {shard.name: write_one(Folder(directory), shard, blocks) for shard in shards}
    return digests | write_index(directory, shards)


def in_blocks(state: dict[str, torch.Tensor], count: int = 7) -> Any:
    def blocks(stored: Stored) -> Iterator[torch.Tensor]:
        return iter(state[stored.name].detach().reshape(-1).split(count))

    return blocks


def stored_of(model: Any, dtype: torch.dtype) -> tuple[list[Stored], dict[str, torch.Tensor]]:
    """Return what of a model is to be written, and its tensors by the name that they get."""
    keys, state = saved_as(model), model.state_dict()
    assert isinstance(keys, dict), keys
    tensors = {key: state[name] for name, key in keys.items()}
    kept = {key: dtype if tensor.is_floating_point() else tensor.dtype for key, tensor in tensors.items()}
    return [Stored(key, tuple(tensor.shape), kept[key]) for key, tensor in tensors.items()], tensors


@pytest.mark.parametrize("shard_bytes", [1_000, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "source", "config"), WRITTEN, ids=NAMES)
def test_what_is_written_in_blocks_loads_as_the_model(
    kind: str, source: str, config: dict[str, Any], dtype: torch.dtype, shard_bytes: int, tmp_path: Path
) -> None:
    import transformers

    model = built(kind, source, config)
    tensors, state = stored_of(model, dtype)
    digests = write(tmp_path, plan(tensors, shard_bytes), in_blocks(state))
    assert (INDEX in digests) == (SINGLE not in digests) == (shard_bytes == 1_000)
    model.config.save_pretrained(tmp_path)
    loaded, info = getattr(transformers, source).from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    expected = model.to(dtype).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.state_dict().items())
    model.save_pretrained(tmp_path / "ordinary")  # under the same names as transformers itself
    with WeightFiles(tmp_path) as ours, WeightFiles(tmp_path / "ordinary") as theirs:
        assert {n: (e.dtype, e.shape) for n, e in ours.entries.items()} == {
            n: (e.dtype, e.shape) for n, e in theirs.entries.items()
        }
        assert isinstance(match(ours, model), Match)


def test_weights_that_transformers_converts_are_not_written_so() -> None:
    mixtral = built("mixtral", CAUSAL, {**SMALL, "num_key_value_heads": 2, "num_local_experts": 2})
    assert "transformers converts" in str(saved_as(mixtral))
    assert saved_as(torch.nn.Linear(1, 1)) == "Linear is no model of transformers"


def test_a_recorded_model_is_written_without_ever_being_made(tmp_path: Path) -> None:
    import transformers

    made = record(lambda: built(*WRITTEN[1]), seed=3)
    keys = saved_as(made.model)
    assert isinstance(keys, dict)
    names = {key: name for name, key in keys.items()}
    shapes = {key: tuple(made.model.get_parameter(name).shape) for key, name in names.items()}

    def blocks(stored: Stored) -> Iterator[torch.Tensor]:
        for start in range(0, stored.numel, 100):
            block = torch.empty(min(100, stored.numel - start))
            made.fill(names[stored.name], start, block)
            yield block

    write(tmp_path, plan([Stored(key, shape, torch.float32) for key, shape in shapes.items()]), blocks)
    made.model.config.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = made.materialise().state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.state_dict().items())


def of_bytes(*sizes: int) -> list[Stored]:
    return [Stored(f"t{at}", (size,), torch.uint8) for at, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "files"),
    [
        ([4, 4, 2], [["t0", "t1", "t2"]]),
        ([4, 4, 4], [["t0", "t1"], ["t2"]]),
        ([11, 1, 30, 5, 5, 1], [["t0"], ["t1"], ["t2"], ["t3", "t4"], ["t5"]]),
        ([10], [["t0"]]),
    ],
)
def test_files_hold_at_most_so_many_bytes_but_for_a_larger_tensor(sizes: list[int], files: list[list[str]]) -> None:
    shards = plan(of_bytes(*sizes), 10)
    assert [[tensor.name for tensor in shard.tensors] for shard in shards] == files
    count = len(files)
    expected = [f"model-{at:05}-of-{count:05}.safetensors" for at in range(1, count + 1)] if count > 1 else [SINGLE]
    assert [shard.name for shard in shards] == expected
    assert [tensor.name for tensor in in_order(shards)] == [f"t{at}" for at in range(len(sizes))]


def test_narrow_tensors_lie_behind_wide_ones_and_all_load(tmp_path: Path) -> None:
    state = {
        **{"bytes": torch.arange(3, dtype=torch.uint8), "half": torch.randn(5).bfloat16(), "one": torch.tensor(2.5)},
        **{"wide": torch.randn(3, 3), "long": torch.arange(4), "none": torch.empty(0, 3), "yes": torch.tensor([True])},
    }
    tensors = [Stored(name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()]
    (shard,) = plan(tensors)
    assert [tensor.dtype.itemsize for tensor in shard.tensors] == [8, 4, 4, 4, 2, 1, 1]
    assert len(header(shard)) % 8 == 0
    write(tmp_path, [shard], in_blocks(state, 2))
    loaded = load_file(tmp_path / SINGLE)
    assert loaded.keys() == state.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in state.items()
    )


def test_digests_are_those_of_the_files_and_damage_is_found_by_the_rank_whose_share_it_is(tmp_path: Path) -> None:
    state = {f"t{at}": torch.randn(50) for at in range(5)}
    digests = write(tmp_path, plan([Stored(name, (50,), torch.float32) for name in state], 200), in_blocks(state))
    assert len(digests) == 6
    assert digests == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    assert [verify(tmp_path, digests, rank, 4) for rank in range(4)] == [None] * 4
    name = sorted(digests)[2]
    with (tmp_path / name).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    found = [verify(tmp_path, digests, rank, 4) for rank in range(4)]
    assert [problem is None for problem in found] == [True, True, False, True]
    assert f"{name} does not read back as it was written" in str(found[2])
    (tmp_path / name).unlink()
    assert f"{name} cannot be read back" in str(verify(tmp_path, digests, 0, 1))
    assert sum(json.loads((tmp_path / INDEX).read_text())["metadata"].values()) == 5 * 200


@pytest.mark.parametrize("elements", [0, 9, 11])
def test_a_tensor_that_is_not_whole_is_refused(elements: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="t0 has 10 elements, and its blocks"):
        write(tmp_path, plan([Stored("t0", (2, 5), torch.float32)]), lambda _: [torch.zeros(elements)])


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_text("of somebody else")
    with pytest.raises(FileExistsError):
        write(tmp_path, plan(of_bytes(4)), lambda _: [torch.zeros(4)])
    assert (tmp_path / SINGLE).read_text() == "of somebody else"


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two have one name"):
        header(Shard(SINGLE, tuple(of_bytes(4) * 2)))


def test_no_more_than_blocks_are_in_memory(tmp_path: Path) -> None:
    def blocks(stored: Stored) -> Iterator[torch.Tensor]:
        for _ in range(64):
            yield torch.zeros(stored.numel // 64)

    tracemalloc.start()
    try:
        digests = write(tmp_path, plan([Stored("t", (16 << 20,), torch.float32)]), blocks)
        assert verify(tmp_path, digests, 0, 1) is None
        assert tracemalloc.get_traced_memory()[1] < 8 << 20  # of 64 MiB
    finally:
        tracemalloc.stop()
