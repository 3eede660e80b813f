"""ZeRO stages from the first number to the files without a model in fp32 anywhere, on two ranks with real engines.

At stage 3 no rank has a whole model of any kind.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.filesize import decimal
from safetensors.torch import load_file, save_file

from cluster import stored_weights, weights_cache
from cluster.errors import UserError
from jobs import lineage
from jobs.checkpoint import catalog
from jobs.checkpoint.store import Store
from jobs.data.prepare import Prepared, prepare, rows_of
from jobs.data.rows import Rows
from jobs.driver.reference import by_the_group
from jobs.run_folder import RunFolder
from jobs.worker import elsewhere, start
from jobs.worker.export import DTYPES, export
from jobs.worker.optimizers import parameter_groups
from jobs.worker.reference import make_in_parts, write_share
from tests.support import parts_ranks, s3_server, tiny_models, two_ranks
from tests.support.s3_server import S3Server

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
PARENTS = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "llama-more": ("llama", {}),
}
"""The last one's files hold a tensor that the model has no place for."""
IN_PARTS = (
    "new,none,fp32", "new,none,bf16", "llama,none,fp32", "llama-tied,none,bf16", "gpt2,none,fp32",
    "llama,all-linear,fp32", "llama,head,bf16", "gpt2,attention,fp32",
    "llama,none,bf16,offload", "new,none,fp32,ahead", "new,none,bf16,ahead,unheld",
)  # fmt: skip
REPLICATED = (
    "new,none,bf16,stage1", "llama,none,bf16,stage2", "llama,all-linear,bf16,stage1", "llama-tied,none,fp32,stage2",
    "gpt2,none,fp32,stage1",
)  # fmt: skip
MERGED = ("qwen3_moe,none,fp32", "qwen3_moe,none,bf16,stage2")
"""Their experts are tensors of their own in the files, and one in the model."""
WHOLE = ("llama-tied,head,fp32", MERGED[0])
IN_FP32 = "llama-more,none,bf16,stage2"
PREFERENCES = ("llama,attention,fp32,preferences", "gpt2,none,bf16,preferences")
DAMAGED = "llama,none,fp32,damaged"
APART = (
    "llama,all-linear,fp32,apart", "gpt2,attention,bf16,apart", "llama-tied,head,fp32,apart",
    "llama,all-linear,bf16,apart,stage1",
)  # fmt: skip
HELD = ("llama,all-linear,fp32,apart,int8,stage0", "gpt2,attention,bf16,apart,int8,stage1",
        "llama,all-linear,fp32,apart,nf4,stage2")  # fmt: skip
STORED = ("llama,none,fp32,stored", "llama,none,bf16,stage1,stored")
REFUSED, DAMAGED_STORED = "llama,none,fp32,stored,refused", "llama,none,fp32,damaged,stored"
FULL = ("llama,all-linear,fp32,full", "llama-tied,head,fp32,full")
"""Written a parameter at a time, and by rank 0."""
LEFT = "models/run/0a0b0c0d/model.safetensors"
"""What a killed export of the first of them has left."""
DAMAGED_APART = ("llama,all-linear,fp32,apart,damaged", "llama,all-linear,fp32,apart,damaged,stage1")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """A store that refuses the first write."""
    with pytest.MonkeyPatch.context() as monkeypatch, s3_server.running(monkeypatch) as server:
        monkeypatch.setenv("TANDEM_TEST_STORE", server.uri("bucket/models"))
        server.failing = 1
        server.objects[f"bucket/{LEFT}"] = b"half"
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, server: S3Server) -> Path:
    """What every case leaves."""
    folder = tmp_path_factory.mktemp("parts")
    fast = tiny_models.tokenizer()
    for name, (kind, changes) in PARENTS.items():
        sizes = {"vocab_size": len(fast), "num_hidden_layers": 1, **changes}
        tiny_models.export(folder / name, fast, tiny_models.decoder(kind, spread=0.2, **sizes))
        if name == "llama-more":
            file = folder / name / "model.safetensors"
            save_file({**load_file(file), "more": torch.zeros(1)}, file, metadata={"format": "pt"})
        spec = parts_ranks.spec_of(f"{name},none,fp32", folder)
        (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in tiny_models.TEXT * 12))
        found = prepare(spec, folder, folder / "s", parent=folder / name, on_progress=lambda *_: None)
        (folder / f"{name}.prepared").write_bytes(pickle.dumps(found))
    for case in PREFERENCES:
        prepare_pairs(folder, case)
    adapted = [*APART, *HELD, *DAMAGED_APART]
    (folder / STORED[0] / "run").mkdir(parents=True)
    elsewhere.note(RunFolder(folder / STORED[0] / "run"), [(server.uri("bucket/models"), "run/0a0b0c0d")])
    cases = [*IN_PARTS, *REPLICATED, *WHOLE, MERGED[1], IN_FP32, *PREFERENCES, *STORED, REFUSED, *adapted, DAMAGED]
    cases += [DAMAGED_STORED, *FULL]
    two_ranks.run("parts_ranks", folder, cases, timeout_s=300)
    return folder


def prepare_pairs(folder: Path, case: str) -> None:
    """Encode pairs of answers: rows for three batches, and a few that are held out."""
    pairs = [{"prompt": f"n {n}", "chosen": "the quick fox", "rejected": "a dog" * (n % 3 + 1)} for n in range(45)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    name, spec = case.split(",")[0], parts_ranks.spec_of(case, folder)
    found = prepare(spec, folder, folder / f"pairs-{name}", parent=folder / name, on_progress=lambda *_: None)
    (folder / f"{name}-preferences.prepared").write_bytes(pickle.dumps(found))


def remarks(folder: Path, case: str) -> str:
    return "\n".join(RunFolder(folder / case / "run").remarks())


def content(path: Path) -> dict:
    """Return what a JSON file holds; the names of adapted layers are a set."""
    found = json.loads(path.read_text())
    if isinstance(found.get("target_modules"), list):
        found["target_modules"].sort()
    return found


def first_whole(folder: Path, case: str) -> torch.nn.Module:
    """Return the model that a job at another stage begins with."""
    spec = parts_ranks.spec_of(case, folder)
    parent = None if case.startswith("new") else folder / case.split(",")[0]
    prepared = pickle.loads((folder / f"{(parent or folder / 'llama').name}.prepared").read_bytes())
    begun = start.begin(spec, prepared.task(spec), parent)
    begun.materialise()
    return begun.model


@pytest.mark.parametrize("case", [IN_PARTS[2], *REPLICATED[3:], HELD[0]])
def test_the_loss_of_each_source_is_that_of_its_rows_alone_at_every_stage(folder: Path, case: str) -> None:
    final = (RunFolder(folder / case / "run").evaluations() or {})["final"]
    prepared = pickle.loads((folder / f"{case.split(',')[0]}.prepared").read_bytes())
    task, rows = prepared.task(parts_ranks.spec_of(case, folder)), rows_of(prepared, prepared.eval_files)
    apart = {"first": np.arange(len(rows) - 1), "last": np.arange(len(rows) - 1, len(rows))}
    targets = {name: rows.targets(own) for name, own in apart.items()}
    of_all = sum(final[f"loss/{name}"] * count for name, count in targets.items()) / sum(targets.values())
    assert final["loss"] == pytest.approx(of_all, rel=1e-6)
    assert final["loss/first"] != pytest.approx(final["loss/last"], rel=1e-3)
    if case not in HELD:  # whose loss is of a base that is in no file
        model = task.load_model(folder / case / "run" / "model", torch.float32)
        for name, own in apart.items():
            with torch.no_grad():
                sums = task.measure(model, task.collate(rows.take(own)))
            assert final[f"loss/{name}"] == pytest.approx(float(sums["loss"]) / targets[name], rel=1e-4)


@pytest.mark.parametrize("case", [*IN_PARTS, *REPLICATED, *MERGED])
def test_ranks_begin_as_the_whole_does_bit_by_bit(folder: Path, case: str) -> None:
    found, precision = load_file(folder / case / "begun.safetensors"), case.split(",")[2]
    expected = first_whole(folder, case).state_dict()
    assert found.keys() <= expected.keys()
    for name, tensor in expected.items():
        if name in found:
            assert torch.equal(found[name], tensor.to(found[name].dtype)), name
    assert len({tensor.dtype for tensor in found.values()} - {DTYPES[precision]}) == 0  # type: ignore[index]


@pytest.mark.parametrize("case", [*IN_PARTS, *REPLICATED, *MERGED])
def test_masters_begin_exact(folder: Path, case: str) -> None:
    """They are fp32, in bf16 too, and of each trained weight everything is there once."""
    model = first_whole(folder, case)
    expected = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = {name: tensor.numel() for name, tensor in expected.items()}
    for rank in range(2):
        for key, part in load_file(folder / case / f"masters-{rank}.safetensors").items():
            name, _, start = key.partition("|")
            assert torch.equal(part, expected[name].view(-1)[int(start) : int(start) + part.numel()]), name
            missing[name] -= part.numel()
    assert not any(missing.values())


@pytest.mark.parametrize("case", [*REPLICATED, MERGED[1]])
def test_no_weight_is_ever_there_twice_or_in_fp32_beside_bf16(folder: Path, case: str) -> None:
    model, precision = first_whole(folder, case), case.split(",")[2]
    named = [*model.named_parameters()]  # adapters are small: drawn whole, one at a time
    matrices = {parameter.shape for name, parameter in named if parameter.dim() > 1 and "lora_" not in name}
    groups = [sum(each.numel() for each in group["params"]) for group in parameter_groups(model.named_parameters(), 0)]
    for rank in range(2):
        made = json.loads((folder / case / f"made-{rank}.json").read_text())
        assert len(made) > 20
        if precision == "bf16":
            assert [each for each in made if each[1] == "torch.float32" and tuple(each[2]) in matrices] == []
        put_together = [each for each in made if each[:2] != ["aten.cat", "torch.int64"] and each[0] == "aten.cat"]
        assert [each for each in put_together if math.prod(each[2]) >= min(groups)] == []


@pytest.mark.parametrize("case", REPLICATED)
def test_a_save_without_memory_for_a_copy_says_so(folder: Path, case: str) -> None:
    """The ranks go on from it bit by bit, of which they see to themselves."""
    said = "checkpoints are written from the training state, and the next update waits for that"
    assert (said in remarks(folder, case)) == ("stage2" in case)


@pytest.mark.parametrize("case", IN_PARTS)
def test_what_is_written_in_parts_is_what_would_be_written_whole(folder: Path, case: str, tmp_path: Path) -> None:
    spec, name = parts_ranks.spec_of(case, folder), case.split(",")[0]
    parent = None if name == "new" else folder / name
    prepared = pickle.loads((folder / f"{(parent or folder / 'llama').name}.prepared").read_bytes())
    task, weights = prepared.task(spec), load_file(folder / case / "trained.safetensors")
    precision = spec.training.precision
    model = start.unadapted(spec, task, parent)
    for tied in model.state_dict().keys() - weights.keys() if spec.model.lora is None else ():
        weights[tied] = weights["model.embed_tokens.weight" if "llama" in name else "transformer.wte.weight"]
    whole = lambda: start.unadapted(spec, task, parent)  # noqa: E731
    export(tmp_path / "whole", task, weights, whole, precision, spec.model.lora, lambda path: None)
    assert "gathers the whole model" not in remarks(folder, case)
    written = folder / case / "run" / "model"
    expected, found = (load_file(at / "model.safetensors") for at in (tmp_path / "whole", written))
    begun = load_file(folder / case / "begun.safetensors")
    assert found.keys() == expected.keys()
    moved = False
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key
        moved |= key not in begun or not torch.equal(found[key], begun[key])
    assert moved, "else nothing was learned"
    names = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert names == {path.relative_to(written) for path in written.rglob("*") if path.is_file()}
    for at in sorted(names):
        if at.suffix == ".json":
            assert content(written / at) == content(tmp_path / "whole" / at), at
    if spec.model.lora is not None:
        adapters = [load_file(at / "adapter" / "adapter_model.safetensors") for at in (tmp_path / "whole", written)]
        assert adapters[0].keys() == adapters[1].keys()
        assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])


@pytest.mark.parametrize("case", WHOLE)
def test_what_cannot_be_written_in_parts_is_said_and_written_whole(folder: Path, case: str) -> None:
    assert "rank 0 gathers the whole model to write it" in remarks(folder, case)
    assert (folder / case / "run" / "model" / "model.safetensors").is_file()


def test_what_is_loaded_whole_in_fp32_before_it_is_bf16_is_said(folder: Path) -> None:
    """It goes on from a save all the same."""
    size = sum(each.nbytes for each in load_file(folder / "llama" / "model.safetensors").values())
    said = f"every worker begins with the whole model in fp32, {decimal(size)}: the model has no place for more"
    assert said in remarks(folder, IN_FP32)
    assert "the whole model" not in remarks(folder, "llama,none,bf16,stage2")
    assert "every worker" not in remarks(folder, MERGED[1])


def test_damage_is_found_by_reading_back_and_nothing_is_left(folder: Path) -> None:
    assert "does not read back as it was written" in remarks(folder, DAMAGED)
    assert not (folder / DAMAGED / "run" / "model").exists()
    assert list((folder / DAMAGED / "run").glob(".model*")) == []


@pytest.mark.parametrize("case", STORED)
def test_weights_in_a_store_are_those_that_were_trained(
    folder: Path, server: S3Server, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    written = folder / case / "run" / "model"
    stored = stored_weights.read(written)
    assert stored is not None
    assert not list(written.glob("*.safetensors")), "they are not here too"
    content = server.objects[f"bucket/models/{stored.folder}/model.safetensors"]
    file = stored.files["model.safetensors"]
    trained = load_file(folder / case / "trained.safetensors")
    found = load_file(weights_cache.local(written) / "model.safetensors")
    assert (len(content), hashlib.sha256(content).hexdigest()) == (file.bytes, file.sha256)
    assert file.elements == sum(tensor.numel() for tensor in found.values())
    assert found.keys() == trained.keys()
    precision = case.split(",")[2]
    assert all(torch.equal(tensor, trained[name].to(DTYPES[precision])) for name, tensor in found.items())  # type: ignore[index]


def test_a_store_holds_what_models_name_and_nothing_else(folder: Path, server: S3Server) -> None:
    """Neither what a killed export left, nor what was damaged; and a write that was refused was tried again."""
    named = {stored_weights.read(folder / case / "run" / "model").folder for case in STORED}  # type: ignore[union-attr]
    held = {key.removeprefix("bucket/models/") for key in server.objects if not key.endswith("/")}
    assert held == {f"{place}/model.safetensors" for place in named}
    assert server.failing == 0


def test_damage_in_a_store_is_found_by_reading_back(folder: Path) -> None:
    assert "does not read back as it was written" in remarks(folder, DAMAGED_STORED)
    assert not (folder / DAMAGED_STORED / "run" / "model").exists()
    assert elsewhere.noted(RunFolder(folder / DAMAGED_STORED / "run")) == []


def test_what_a_store_refuses_is_kept_as_a_checkpoint(folder: Path) -> None:
    assert "model.export: the weights could not be written to s3://refused/models/run/" in remarks(folder, REFUSED)
    assert not (folder / REFUSED / "run" / "model").exists()
    found = catalog.newest_valid(Store(str(folder / REFUSED)))[0]
    assert found is not None
    assert found.step == parts_ranks.STEPS


@pytest.mark.parametrize("case", FULL)
def test_what_a_disk_does_not_take_is_kept_as_a_checkpoint_by_all_ranks(folder: Path, case: str) -> None:
    assert "File too large" in remarks(folder, case)
    assert [path.name for path in (folder / case / "run").iterdir() if "model" in path.name] == []
    found = catalog.newest_valid(Store(str(folder / case)))[0]
    assert found is not None
    assert found.step == parts_ranks.STEPS


@pytest.mark.parametrize("case", [*APART, *HELD])
def test_adapters_kept_apart_are_those_that_were_trained(folder: Path, case: str) -> None:
    spec, parent = parts_ranks.spec_of(case, folder), folder / case.split(",")[0]
    prepared = pickle.loads((folder / f"{parent.name}.prepared").read_bytes())
    task, trained = prepared.task(spec), load_file(folder / case / "trained.safetensors")
    written = folder / case / "run" / "model"
    assert not list(written.glob("model*.safetensors")), "the base is not written again"
    base = json.loads((written / "base.json").read_text())
    assert base == {"at": str(parent), "digest": lineage.weights_digest(parent)}
    adapters = load_file(written / "adapter_model.safetensors")
    names = {name.replace(".default", ""): name for name in trained if ".lora_" in name}
    assert adapters.keys() == names.keys()
    for name, tensor in adapters.items():
        assert torch.equal(tensor, trained[names[name]].float()), name
    assert any(tensor.any() for name, tensor in adapters.items() if "lora_B" in name), "else nothing was learned"
    plain, adapted = (task.load_model(at, torch.float32) for at in (parent, written))
    moved = [name for name, p in adapted.named_parameters() if not torch.equal(p, plain.get_parameter(name))]
    assert len(moved) == len(names) // 2


@pytest.mark.parametrize("case", DAMAGED_APART)
def test_damaged_adapters_are_found_at_the_loss_and_nothing_is_left(folder: Path, case: str) -> None:
    assert "the exported model is not the one that was trained" in remarks(folder, case)
    assert not (folder / case / "run" / "model").exists()
    assert list((folder / case / "run").glob(".model*")) == []


@pytest.mark.parametrize("case", HELD)
def test_beside_a_base_of_few_bits_nearly_the_same_is_learned(folder: Path, case: str) -> None:
    kind = "int8" if "int8" in case else "nf4"
    assert f"the base is held in {kind} while adapters are trained" in remarks(folder, case)
    beside = case.partition(f",{kind}")[0]
    found, whole = (RunFolder(folder / each / "run").evaluations()["final"]["loss"] for each in (case, beside))
    assert found != whole
    assert found == pytest.approx(whole, rel=0.01 if kind == "int8" else 0.05)


@pytest.mark.parametrize("case", PREFERENCES)
def test_the_group_makes_a_reference_as_tasks_with_the_whole_model_do(folder: Path, case: str, tmp_path: Path) -> None:
    spec, name = parts_ranks.spec_of(case, folder), case.split(",")[0]
    prepared = pickle.loads((folder / f"{name}-preferences.prepared").read_bytes())
    files = [*prepared.train_files, *prepared.eval_files]
    count = write_share(spec, str(folder / name), prepared, spec.training.precision, str(tmp_path), files)
    assert count == prepared.train_rows + prepared.eval_rows > 40
    made = Path(prepared.directory) / "reference-group"
    assert sorted(path.name for path in made.iterdir()) == sorted(files)
    for file in files:
        both = [Rows([at / file]) for at in (made, tmp_path)]
        of_group, of_task = (found.take(np.arange(len(found)))["reference"] for found in both)
        assert np.array_equal(of_group, of_task)
        assert len(np.unique(of_group)) > 1


def test_a_group_whose_model_has_learned_makes_no_reference(tmp_path: Path) -> None:
    found = Prepared(str(tmp_path), "x", "d", ["train.arrow"], [], 1, 0, reference="reference-x")
    with pytest.raises(UserError, match=r"answers, .*reference-x, are gone, and the model has learned 7 steps since"):
        make_in_parts(None, None, found, 7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("zero", "behind", "by_group"),
    [
        ({"stage": 3}, 0, True),
        ({"stage": 3}, 1, False),
        ({"stage": 2}, 0, False),
    ],
)
def test_the_group_makes_the_reference_where_it_has_the_model_in_parts(
    tmp_path: Path, zero: dict, behind: int, by_group: bool
) -> None:
    spec = parts_ranks.spec_of("llama,none,bf16,preferences", tmp_path)
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    training = spec.training.model_copy(update={"deepspeed": "zero.json"})
    assert by_the_group(spec.model_copy(update={"training": training}), tmp_path, "bf16", behind) == by_group
