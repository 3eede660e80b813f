"""Phases `evaluate` and `quantize` in one process: what is written does not depend on what is computed in."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jobs.data.prepare import Prepared, prepare
from jobs.spec import JobSpec
from jobs.tasks import get
from jobs.worker.evaluate import NotFinite, evaluate_share
from jobs.worker.quantize import quantize
from serve.engines.protocol import GenerationRequest, SamplingParams
from serve.engines.torch.torch_engine import TorchEngine
from tests.support import tiny_models
from tracking.manifest import ModelManifest, write

pytestmark = pytest.mark.instructions


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as a machine with bf16 instructions exports it."""
    directory = tiny_models.language_model(tmp_path_factory.mktemp("models") / "parent")
    get("causal-lm").load(directory).load_model(directory, torch.bfloat16).save_pretrained(str(directory))  # type: ignore[operator]
    return directory


@pytest.fixture(scope="module")
def spec(parent: Path) -> JobSpec:
    lines = [json.dumps({"text": text}) for text in tiny_models.TEXT * 20]
    (parent.parent / "held-out.jsonl").write_text("\n".join(lines))
    data = {"eval": "held-out.jsonl", "sequence_length": 32}
    return JobSpec.model_validate({"name": "q", "phase": "quantize", "model": {"from": str(parent)}, "data": data})


@pytest.fixture(scope="module")
def prepared(spec: JobSpec, parent: Path) -> Prepared:
    return prepare(spec, parent.parent, parent.parent / "storage", parent=parent, on_progress=lambda *_: None)


def test_int8_weights_are_the_same_whatever_they_are_measured_in(
    spec: JobSpec, prepared: Prepared, parent: Path, tmp_path: Path
) -> None:
    reports = {p: quantize(spec, str(parent), prepared, p, str(tmp_path / p)) for p in ("bf16", "fp32")}  # type: ignore[arg-type]
    files = {p: load_file(tmp_path / p / "model.safetensors") for p in reports}
    assert files["bf16"].keys() == files["fp32"].keys()
    assert all(torch.equal(tensor, files["fp32"][name]) for name, tensor in files["bf16"].items())
    assert {tensor.dtype for tensor in files["fp32"].values()} == {torch.int8, torch.float32, torch.bfloat16}
    for report in reports.values():
        assert report["bytes"] < report["parent_bytes"]
        assert abs(report["loss_change"]) < 0.01
    # bf16 rounds what fp32 does not: the same to two bf16 steps, and not the same
    losses = [report["eval_loss"] for report in reports.values()]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=2**-7)


def test_evaluation_computes_in_what_was_decided(spec: JobSpec, prepared: Prepared, parent: Path) -> None:
    sums = {p: evaluate_share(spec, str(parent), prepared, p, 0, 1) for p in ("bf16", "fp32")}  # type: ignore[arg-type]
    assert sums["bf16"]["targets"] == sums["fp32"]["targets"] > 0
    assert sums["bf16"]["loss"] != sums["fp32"]["loss"]
    assert sums["bf16"]["loss"] == pytest.approx(sums["fp32"]["loss"], rel=2**-7)


def test_gpt2s_conv1d_layers_are_quantised_and_nobody_else_misreads_the_folder(tmp_path: Path) -> None:
    fast = tiny_models.tokenizer()
    model = tiny_models.decoder("gpt2", vocab_size=len(fast))
    parent = tiny_models.export(tmp_path / "parent", fast, model)
    (tmp_path / "held-out.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in tiny_models.TEXT * 20))
    values = {"name": "q", "phase": "quantize", "model": {"from": str(parent)}}
    spec = JobSpec.model_validate({**values, "data": {"eval": "held-out.jsonl", "sequence_length": 32}})
    ready = prepare(spec, tmp_path, tmp_path / "storage", parent=parent, on_progress=lambda *_: None)
    report = quantize(spec, str(parent), ready, "fp32", str(tmp_path / "int8"))
    assert report["layers"] == {
        "quantised": 8,
        "of": 9,
        "kinds": {"c_attn": 2, "c_proj": 4, "c_fc": 2},
        "left": {"lm_head": 1},
    }
    assert report["bytes"] < 0.6 * report["parent_bytes"]
    assert abs(report["loss_change"]) < 0.01
    files = load_file(tmp_path / "int8" / "model.safetensors")
    assert {name for name, tensor in files.items() if tensor.dtype == torch.int8 and "qdata" in name} == {
        f"transformer.h.{layer}.{kind}._weight_qdata"
        for layer in range(2)
        for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held-out.jsonl", "int8", "parent", "storage"]
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    write(tmp_path / "int8", ModelManifest(name="g", task="causal-lm", architecture="gpt2"))
    assert asyncio.run(_greedy(tmp_path / "int8", [5, 6, 7])) == _reference(tmp_path / "int8", [5, 6, 7])


async def _greedy(directory: Path, prompt: list[int]) -> list[int]:
    """Return 8 tokens as the torch engine makes them from the files."""
    engine = TorchEngine.from_directory(directory, precision="fp32", threads=1)
    await engine.start()
    try:
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        request = GenerationRequest("r", tuple(prompt), params)
        return [token async for delta in engine.generate(request) for token in delta.token_ids]
    finally:
        await engine.stop()


def _reference(directory: Path, prompt: list[int]) -> list[int]:
    model = get("causal-lm").load(directory).load_model(directory, torch.float32)
    made: list[int] = []
    for _ in range(8):
        made.append(int(model(torch.tensor([prompt + made])).logits[0, -1].argmax()))
    return made


def test_a_parent_that_computes_nan_is_refused_and_nothing_is_left(
    spec: JobSpec, prepared: Prepared, parent: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(parent, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFinite, match=r"broken on the held-out rows is nan"):
        quantize(spec, str(broken), prepared, "fp32", str(tmp_path / "int8"))
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
