"""A version of adapters alone is measured, quantised and served as the merged one is."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.data.prepare import prepare
from jobs.spec import JobSpec
from jobs.worker.evaluate import evaluate_share
from jobs.worker.quantize import quantize
from serve.engines.protocol import GenerationRequest, SamplingParams
from serve.engines.torch.torch_engine import TorchEngine
from tests.support import tiny_models
from tests.support.adapters_apart import merged, written
from tracking import manifest

LAYOUTS = ("whole", "apart")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `base`, and what was trained on it: `whole` and `apart`."""
    folder = tmp_path_factory.mktemp("models")
    tiny_models.language_model(folder / "base")
    merged(folder / "base", folder / "whole", "all-linear", "fp32")
    manifest.write(folder / "whole", manifest.ModelManifest(name="w", task="causal-lm", architecture="llama"))
    written(folder / "base", folder / "apart", "all-linear", "fp32")
    (folder / "held-out.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in tiny_models.TEXT * 20))
    return folder


def spec(folder: Path, phase: str, source: str) -> JobSpec:
    data = {"eval": "held-out.jsonl", "sequence_length": 32}
    return JobSpec.model_validate({"name": "x", "phase": phase, "model": {"from": str(folder / source)}, "data": data})


def test_losses_are_equal(folder: Path, tmp_path: Path) -> None:
    sums = {}
    for name in ("base", *LAYOUTS):
        job = spec(folder, "evaluate", name)
        ready = prepare(job, folder, tmp_path, parent=folder / name, on_progress=lambda *_: None)
        sums[name] = evaluate_share(job, str(folder / name), ready, "fp32", 0, 1)
    assert sums["apart"] == sums["whole"]
    assert sums["apart"]["loss"] != sums["base"]["loss"]


def test_int8_weights_are_equal(folder: Path, tmp_path: Path) -> None:
    reports = {}
    for name in LAYOUTS:
        job = spec(folder, "quantize", name)
        ready = prepare(job, folder, tmp_path / "s", parent=folder / name, on_progress=lambda *_: None)
        reports[name] = quantize(job, str(folder / name), ready, "fp32", str(tmp_path / name))
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("apart", "whole"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert reports["apart"]["bytes"] < reports["apart"]["parent_bytes"]
    assert not (tmp_path / "apart" / "base.json").exists(), "it is whole"


async def greedy(directory: Path) -> list[int]:
    """Return 12 tokens as the torch engine makes them from the files."""
    engine = TorchEngine.from_directory(directory, precision="fp32", threads=1)
    await engine.start()
    try:
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        request = GenerationRequest("r", (5, 6, 7), params)
        return [token async for delta in engine.generate(request) for token in delta.token_ids]
    finally:
        await engine.stop()


def test_the_engine_makes_the_same_text(folder: Path) -> None:
    texts = {name: asyncio.run(greedy(folder / name)) for name in ("base", *LAYOUTS)}
    assert texts["apart"] == texts["whole"] != texts["base"]
