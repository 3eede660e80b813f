"""Where a model may be compiled, where what is compiled is kept, and what a compiler's time counts as."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from cluster import specfile
from cluster.errors import UserError
from jobs.spec import JobSpec, TrainingSpec
from jobs.tasks import IGNORED, cross_entropy
from jobs.worker import compiling, zero
from jobs.worker.compiling import Compiling
from jobs.worker.watchdog import Watchdog

CPU = torch.device("cpu")
BASE = (
    "{name: x, phase: pretrain, model: {architecture: llama}, data: {train: a.txt}, "
    "training: {steps: 5, compile: true, deepspeed: {zero_stage: 3}}}"
)


def test_stage_3_is_not_compiled_on_cpus() -> None:
    with pytest.raises(UserError, match=r"training\.compile`: ZeRO stage 3 on CPUs .* take stage 1 or 2"):
        specfile.loads(BASE, JobSpec, ())
    with pytest.raises(UserError, match=r"training\.compile: ZeRO stage 3 on CPUs"):
        compiling.check(3, on_gpu=False, environment={})
    assert specfile.loads(BASE, JobSpec, ("resources.gpus_per_worker=1",))
    assert specfile.loads(BASE, JobSpec, ("training.deepspeed.zero_stage=2",))
    compiling.check(3, on_gpu=True, environment={})


def test_a_node_without_a_compiler_is_named() -> None:
    with pytest.raises(UserError, match=r"has no C\+\+ compiler \(no-such-thing\): install g\+\+"):
        compiling.check(1, on_gpu=False, environment={"CXX": "no-such-thing"})


def test_deepcompile_is_what_stage_3_is_compiled_by_on_gpus(tmp_path: Path) -> None:
    def made(on_gpu: bool, **training: object) -> dict[str, object]:
        spec = TrainingSpec.model_validate({"steps": 1, **training})
        return zero.deepspeed_config(spec, 1, 1, precision="fp32", on_gpu=on_gpu)

    assert made(True, compile=True, deepspeed={"zero_stage": 3})["compile"] == {"deepcompile": True}
    assert "compile" not in made(True, compile=True, deepspeed={"zero_stage": 1})
    assert "compile" not in made(True, deepspeed={"zero_stage": 3})
    (tmp_path / "ds.json").write_text('{"compile": {"deepcompile": true}}')
    named = TrainingSpec.model_validate({"steps": 1, "deepspeed": "ds.json"})
    with pytest.raises(UserError, match=r"`compile`: the spec's training.compile decides it"):
        zero.read_named(named, tmp_path)


def test_machine_code_is_kept_apart_by_the_kind_of_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "/before")
    place = compiling.keep_in(tmp_path, CPU)
    assert place.is_dir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(place)
    assert os.environ["TRITON_CACHE_DIR"].startswith(str(place))
    kinds = {compiling.kind_of(CPU, flags) for flags in ({"avx2"}, {"avx2", "avx512f"}, {"avx512f", "avx2"})}
    assert len(kinds) == 2
    assert all(kind.startswith(f"torch-{torch.__version__}-python-") for kind in kinds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_compiled_and_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_ways", {})
    logits = torch.randn(2, 5, 33, dtype=dtype, requires_grad=True)
    labels = torch.tensor([[0, 32, IGNORED, 7, 7], [IGNORED] * 5])

    def computed() -> tuple[torch.Tensor, torch.Tensor]:
        logits.grad = None
        sums = cross_entropy.cross_entropy_sums(logits, labels)
        (sums * torch.tensor([0.5, 2.0])).sum().backward()
        assert logits.grad is not None
        return sums.detach(), logits.grad.clone()

    written = computed()
    graphs = counters["stats"]["unique_graphs"]
    cross_entropy.by_compiler()
    with torch.compiler.set_stance("force_eager"):
        assert all(torch.equal(one, other) for one, other in zip(computed(), written, strict=True))
    assert counters["stats"]["unique_graphs"] == graphs
    compiled = computed()
    assert counters["stats"]["unique_graphs"] == graphs + 1
    torch.testing.assert_close(compiled, written)
    assert written[0][1] == compiled[0][1] == 0


def test_a_compiler_that_works_is_no_hang_and_its_time_is_told_once(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path / "rank-0.txt", 500.0)
    try:
        listener = Compiling(dog, tmp_path / "kept")
        assert listener.take() == {}
        assert "nothing was compiled" in listener.said()
        dog.step(0.1)
        within: list[float] = []

        def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
            within.append(dog._deadline - dog._armed_at)
            return graph.forward

        torch.compile(lambda tensor: tensor + 3, backend=backend)(torch.ones(2))
        assert within == [pytest.approx(500.0)], "and not three steps and 8 s"
        assert dog._deadline - dog._armed_at == pytest.approx(8.3)
        told = listener.take()
        assert 0 < told["compile_s"] == listener.total_s
        assert listener.take() == {}
        assert f"a later start finds that in {tmp_path / 'kept'}" in listener.said()
    finally:
        dog.stop()
