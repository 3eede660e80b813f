"""Weights read by ranges (jobs/worker/weight_files.py), and which checkpoints can be (jobs/worker/weight_match.py)."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.worker import weight_files
from jobs.worker.weight_conversion import Conversion, Runs, Shapes, stored
from jobs.worker.weight_files import INDEX, SINGLE, WeightFiles
from jobs.worker.weight_match import Match, match
from jobs.worker.weights import Unreadable
from tests.support import tiny_models

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "BLOCK_BYTES", 64)


@pytest.mark.parametrize("kept", FLOATS)
@pytest.mark.parametrize("wanted", FLOATS)
def test_any_range_is_that_of_the_flattened_tensor(kept: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(7, 13).to(kept), "b": torch.randn(3, 5, 2).to(kept), "c": torch.randn(()).to(kept)}
    save_file(tensors, tmp_path / SINGLE)
    with WeightFiles(tmp_path) as files:
        for name, tensor in tensors.items():
            flat, numel = tensor.view(-1).to(wanted), tensor.numel()
            for start, stop in ((0, numel), (numel // 3, numel - 1), (numel // 2, numel // 2), (numel - 1, numel)):
                out = torch.full((max(0, stop - start),), torch.nan, dtype=wanted)
                files.read(name, start, out)
                assert torch.equal(out, flat[start : start + len(out)])


def test_several_files_and_other_dtypes(tmp_path: Path) -> None:
    first = {"a": torch.arange(20), "b": torch.tensor([True, False])}
    second = {"c": torch.arange(9, dtype=torch.uint8).view(3, 3), "d": torch.empty(0, 4)}
    save_file(first, tmp_path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(second, tmp_path / "model-00002-of-00002.safetensors")
    where = dict.fromkeys("ab", "model-00001-of-00002.safetensors")
    where |= dict.fromkeys("cd", "model-00002-of-00002.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    with WeightFiles(tmp_path) as files:
        assert {name: entry.shape for name, entry in files.entries.items()} == {
            **{"a": (20,), "b": (2,)},
            **{"c": (3, 3), "d": (0, 4)},
        }
        for name, tensor in {**first, **second}.items():
            found = files.whole(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)


def test_tensors_are_compared_by_their_bytes(tmp_path: Path) -> None:
    a = torch.randn(50)
    changed, zero = a.clone(), torch.zeros(50)
    changed[49] += 1
    save_file(
        {"a": a, "b": a.clone(), "c": changed, "d": a.view(5, 10).clone(), "z": zero, "-z": -zero}, tmp_path / SINGLE
    )
    with WeightFiles(tmp_path) as files:
        assert files.equal("a", "b")
        assert not any(files.equal("a", other) for other in ("c", "d", "z"))
        assert not files.equal("z", "-z")


def test_ranges_outside_of_a_tensor_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(12), "b": torch.ones(12)}, tmp_path / SINGLE)
    with WeightFiles(tmp_path) as files:
        for start, count in ((0, 13), (12, 1), (-1, 2)):
            with pytest.raises(ValueError, match="a has 12 elements"):
                files.read("a", start, torch.empty(count))


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DAMAGED = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a header longer than the file": file_of({}, length=1 << 40),
    "no JSON": file_of(b"{]"),
    "no UTF-8": file_of(b"\xff\xfe"),
    "no object": file_of([]),
    "deep": file_of(b"[" * 100_000),
    "a name twice": file_of(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":1}', bytes(4)),
    "no shape": file_of({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
    "a negative size": file_of({"a": entry([-1], [0, 4])}, bytes(4)),
    "a size that is true": file_of({"a": entry([True], [0, 4])}, bytes(4)),
    "a broken size": file_of({"a": entry([1.0], [0, 4])}, bytes(4)),
    "three offsets": file_of({"a": entry([1], [0, 2, 4])}, bytes(4)),
    "offsets backwards": file_of({"a": entry([1], [4, 0])}, bytes(4)),
    "bytes that are no elements": file_of({"a": entry([2], [0, 4])}, bytes(4)),
    "sizes that overflow": file_of({"a": entry([1 << 40, 1 << 40], [0, 0])}),
    "a dtype that is no text": file_of({"a": entry([1], [0, 4], dtype=4)}, bytes(4)),
    "overlap": file_of({"a": entry([1], [0, 4]), "b": entry([1], [2, 6])}, bytes(6)),
    "a hole": file_of({"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, bytes(12)),
    "a hole in front": file_of({"a": entry([1], [4, 8])}, bytes(8)),
    "cut": file_of({"a": entry([2], [0, 8])}, bytes(7)),
    "more behind it": file_of({"a": entry([1], [0, 4])}, bytes(5)),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(Unreadable, match=SINGLE):
        WeightFiles(tmp_path)
    with pytest.raises(Exception, match=r".*"):  # nor does the library read it: nothing is refused that it takes
        load_file(tmp_path / SINGLE)


def test_a_file_that_is_cut_after_it_was_looked_at_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / SINGLE)
    with WeightFiles(tmp_path) as files:
        with (tmp_path / SINGLE).open("r+b") as file:
            file.truncate(300)
        files.read("a", 0, torch.empty(10))
        with pytest.raises(Unreadable, match="ends after 300 bytes"):
            files.read("a", 0, torch.empty(100))


def test_a_dtype_that_torch_has_not_is_listed_and_not_read(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(file_of({"a": entry([2], [0, 1], dtype="F4")}, bytes(1)))
    with WeightFiles(tmp_path) as files:
        assert files.entries["a"].dtype == "F4"
        with pytest.raises(Unreadable, match="'a' is of dtype F4"):
            files.read("a", 0, torch.empty(1))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is no index of weights"),
        (b"[]", "is no index of weights"),
        (b'{"weight_map": 3}', "is no index of weights"),
        (b'{"weight_map": {}}', "names no weights"),
        (b'{"weight_map": {"a": "../x.safetensors"}}', "'a' is said to be in '../x.safetensors'"),
        (b'{"weight_map": {"a": "x.bin"}}', "'a' is said to be in 'x.bin'"),
        (b'{"weight_map": {"a": null}}', "'a' is said to be in None"),
        (b'{"weight_map": {"a": "y.safetensors"}}', "y.safetensors cannot be read: No such file"),
        (b'{"weight_map": {"b": "x.safetensors"}}', r"x.safetensors: .* says that it holds 'b', and it does not"),
        (b'{"weight_map": {"a": "x.safetensors", "c": "z.safetensors"}}', "'a' is in x.safetensors too"),
    ],
)
def test_an_index_at_odds_with_its_files_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(1), "c": torch.zeros(1)}, tmp_path / "z.safetensors")
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(Unreadable, match=said):
        WeightFiles(tmp_path)


def test_a_directory_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="has neither model"):
        WeightFiles(tmp_path)


# -- which checkpoints can be read so ---------------------------------------------------------------------------------


def model_of(kind: str, source: str = "AutoModelForCausalLM", seed: int = 0, **config: Any) -> Any:
    import transformers

    from jobs.tasks import cnn, lstm

    lstm.register(), cnn.register()
    torch.manual_seed(seed)
    made = getattr(transformers, source).from_config(transformers.AutoConfig.for_model(kind, **config))
    for name, buffer in made.named_buffers():
        if "running" in name:  # what has been learned is to be told from what is fresh
            buffer.uniform_()
    return made


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_channels": 1}
QWEN3_MOE = {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE |= {"moe_intermediate_size": 12, "decoder_sparse_step": 2}
SEQ, TEXT, IMAGE = "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification", "AutoModelForImageClassification"
STORED: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "AutoModelForCausalLM", SMALL),
    ("llama", "AutoModelForCausalLM", {**SMALL, "tie_word_embeddings": True}),
    ("gpt2", "AutoModelForCausalLM", GPT2),
    ("lstm", "AutoModelForCausalLM", {"vocab_size": 40, "hidden_size": 16}),
    ("bert", TEXT, SMALL),
    ("t5", SEQ, T5),
    ("vit", IMAGE, {**SMALL, "image_size": 16, "patch_size": 8}),
    ("resnet", IMAGE, RESNET),
    ("cnn", IMAGE, {"width": 8}),
    ("mixtral", "AutoModelForCausalLM", {**SMALL, "num_key_value_heads": 2, "num_local_experts": 12}),
    ("qwen3_moe", "AutoModelForCausalLM", {**SMALL, **QWEN3_MOE}),
    ("nomic_bert", "AutoModelForMaskedLM", SMALL),
]
NAMED = [f"{kind}-tied" if config.get("tie_word_embeddings") else kind for kind, _, config in STORED]


def emptied(source: str, directory: Path) -> Any:
    """Return the model that a directory's config describes, without memory."""
    import transformers

    with torch.device("meta"):
        return getattr(transformers, source).from_config(transformers.AutoConfig.from_pretrained(directory))


def matched(source: str, directory: Path) -> Match | str:
    with WeightFiles(directory) as files:
        return match(files, emptied(source, directory))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "source", "config"), STORED, ids=NAMED)
def test_what_is_read_in_slices_is_what_transformers_loads(
    kind: str, source: str, config: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    import transformers

    model_of(kind, source, **config).to(dtype).save_pretrained(tmp_path, max_shard_size="5KB")
    loaded = getattr(transformers, source).from_pretrained(tmp_path, dtype=torch.float32)
    model = emptied(source, tmp_path)
    with WeightFiles(tmp_path) as files:
        found = match(files, model)
        assert isinstance(found, Match), found
        assert found.parameters.keys() == dict(loaded.named_parameters()).keys()
        for name, parameter in loaded.named_parameters():
            out = torch.full((parameter.numel(),), torch.nan)
            half = len(out) // 2
            found.read(files, found.parameters[name], half, out[half:])
            found.read(files, found.parameters[name], 0, out[:half])
            assert torch.equal(out, parameter.detach().view(-1)), name
        stored = {
            name for name in loaded.state_dict() if name not in dict(loaded.named_parameters(remove_duplicate=False))
        }
        assert found.buffers.keys() == stored
        for name in stored:
            buffer = loaded.get_buffer(name)
            out = torch.empty(buffer.numel(), dtype=buffer.dtype)
            found.read(files, found.buffers[name], 0, out)
            assert torch.equal(out.view(buffer.shape), buffer), name


def edited(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a directory's one file."""
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def test_prefixes_and_old_names_are_followed_as_transformers_does(tmp_path: Path) -> None:
    model = model_of("llama", "AutoModel", **SMALL, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / SINGLE)  # no prefix
    found = matched("AutoModelForCausalLM", tmp_path)
    assert isinstance(found, Match), found
    assert found.parameters["model.embed_tokens.weight"] == stored("embed_tokens.weight", 640)
    bert = tmp_path / "bert"
    model_of("bert", TEXT, **SMALL).save_pretrained(bert)

    def as_tensorflow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["bert.embeddings.LayerNorm.gamma"] = tensors.pop("bert.embeddings.LayerNorm.weight")

    edited(bert, as_tensorflow)
    found = matched(TEXT, bert)
    assert isinstance(found, Match), found
    assert found.parameters["bert.embeddings.LayerNorm.weight"] == stored("bert.embeddings.LayerNorm.gamma", 16)


def test_a_head_that_is_tied_and_stored_has_to_be_the_embedding(tmp_path: Path) -> None:
    model_of("llama", **SMALL, tie_word_embeddings=True).save_pretrained(tmp_path)

    def twice(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edited(tmp_path, twice)
    assert isinstance(matched("AutoModelForCausalLM", tmp_path), Match)
    edited(tmp_path, lambda tensors: tensors["lm_head.weight"][3, 3].add_(1))
    assert "are one by the config, and two in the files" in str(matched("AutoModelForCausalLM", tmp_path))


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("model.norm.weight"), "model.norm.weight is not in the files"),
        (drop("lm_head.weight"), "lm_head.weight is not in the files"),
        (put("model.more", torch.zeros(1)), "the model has no place for model.more"),
        (put("model.norm.weight", torch.zeros(8)), r"\(8,\) in the files, and model.norm.weight \(16,\)"),
        (put("model.norm.weight", torch.zeros(16, dtype=torch.int8)), "of dtype I8"),
        (put("norm.weight", torch.zeros(16)), "both loaded as model.norm.weight"),
    ],
)
def test_a_checkpoint_that_leaves_a_doubt_is_loaded_whole(change: Any, said: str, tmp_path: Path) -> None:
    model_of("llama", **SMALL).save_pretrained(tmp_path)
    assert isinstance(matched("AutoModelForCausalLM", tmp_path), Match)
    edited(tmp_path, change)
    found = matched("AutoModelForCausalLM", tmp_path)
    assert isinstance(found, str)
    assert re.search(said, found), found


def test_experts_are_read_from_their_own_places_and_a_missing_one_is_noticed(tmp_path: Path) -> None:
    model_of("mixtral", **SMALL, num_key_value_heads=2, num_local_experts=12).save_pretrained(tmp_path)
    found = matched("AutoModelForCausalLM", tmp_path)
    assert isinstance(found, Match), found
    (runs,) = (source for name, source in found.parameters.items() if "layers.1" in name and "gate_up" in name)
    experts = [f"model.layers.1.block_sparse_moe.experts.{at}" for at in range(12)]  # the tenth behind the ninth
    keys = tuple(f"{expert}.{name}.weight" for expert in experts for name in ("w1", "w3"))
    assert runs == Runs(keys, (0,) * 24, tuple(range(24 * 16, 25 * 24 * 16, 24 * 16)))
    assert found.whole == []
    edited(tmp_path, drop(f"{experts[3]}.w1.weight"))
    assert "transformers does not make" in str(matched("AutoModelForCausalLM", tmp_path))
    edited(tmp_path, drop(f"{experts[3]}.w3.weight"))
    assert "gate_up_proj (12, 48, 16) in the model" in str(matched("AutoModelForCausalLM", tmp_path))


def operations() -> dict[str, tuple[list[Any], bool]]:
    """Conversions of a (6, 8) and of another into one, and whether rows come out of them as they went in."""
    from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, Transpose
    from transformers.integrations.gguf.gguf_conversion_mapping import SubtractOne

    return {
        "stacked": ([MergeModulelist(dim=0), Concatenate(dim=1)], True),
        "behind each other": ([Concatenate(dim=0)], True),
        "beside each other": ([Concatenate(dim=1)], False),
        "interleaved": ([Concatenate(dim=0), Interleave(dim=0)], True),
        "interleaved within rows": ([Concatenate(dim=0), Interleave(dim=1)], False),
        "transposed": ([Concatenate(dim=0), Transpose(0, 1)], False),
        "calculated": ([Concatenate(dim=0), SubtractOne()], False),
    }


@pytest.mark.parametrize("name", operations())
def test_a_conversion_is_read_by_ranges_where_it_keeps_rows_and_else_made_whole(name: str, tmp_path: Path) -> None:
    from transformers.core_model_loading import WeightConverter

    done, keeps_rows = operations()[name]
    tensors = {"a": torch.randn(6, 8), "b": torch.randn(6, 8)}
    save_file(tensors, tmp_path / SINGLE)
    made = Conversion(Shapes(None, {}), "c", {"a": ["a"], "b": ["b"]}, WeightConverter(["a", "b"], "c", done))
    with WeightFiles(tmp_path) as files:
        whole, runs = made.made(files)["c"], made.runs({"a": (6, 8), "b": (6, 8)})
        assert (runs is not None) == keeps_rows
        if runs is not None:
            parts = [torch.empty(7), torch.empty(whole.numel() - 7)]
            runs["c"].read(files, 7, parts[1]), runs["c"].read(files, 0, parts[0])
            assert torch.equal(torch.cat(parts), whole.reshape(-1))


def test_quantised_and_adapted_weights_are_loaded_whole(tmp_path: Path) -> None:
    model_of("llama", **SMALL).save_pretrained(tmp_path)
    model = emptied("AutoModelForCausalLM", tmp_path)
    with WeightFiles(tmp_path) as files:
        model.config.quantization_config = {"quant_method": "torchao"}
        assert match(files, model) == "its weights are quantised"
        assert match(files, torch.nn.Linear(2, 2)) == "Linear is no model of transformers"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert matched("AutoModelForCausalLM", tmp_path) == "there are adapters beside the weights"


def test_a_model_directory_of_ours_is_read(tmp_path: Path) -> None:
    directory = tiny_models.language_model(tmp_path / "model")
    assert isinstance(matched("AutoModelForCausalLM", directory), Match)
