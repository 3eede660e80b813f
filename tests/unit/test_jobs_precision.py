"""What a run computes in: the section of its phase asks, an earlier attempt's choice stays, params show the choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.precision import Decision, Device
from jobs.driver.precision import in_params, with_kept
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec

NATIVE, EMULATED = Device(True, "the CPU has avx512_bf16"), Device(False, "the CPU lacks avx512_bf16")


def spec(phase: str = "pretrain", **sections: Any) -> JobSpec:
    model = {"architecture": "llama"} if phase == "pretrain" else {"from": "models:/m@a"}
    training = {"training": {"steps": 1}} if phase in ("pretrain", "finetune") else {}
    data = {"train": "python-stdlib"}
    return JobSpec.model_validate({"name": "j", "phase": phase, "model": model, "data": data, **training, **sections})


@pytest.mark.parametrize(
    ("phase", "sections", "wanted"),
    [
        ("pretrain", {}, "auto"),
        ("pretrain", {"training": {"steps": 1, "precision": "bf16"}}, "bf16"),
        ("evaluate", {"evaluate": {"precision": "fp32"}}, "fp32"),
        ("evaluate", {}, "auto"),
        ("quantize", {"quantize": {"precision": "fp32"}}, "fp32"),
    ],
)
def test_the_section_of_the_phase_asks(phase: str, sections: dict[str, Any], wanted: str) -> None:
    assert spec(phase, **sections).precision == wanted


def test_a_run_keeps_what_it_began_with(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.precision() is None
    assert with_kept(spec(), [NATIVE], folder.precision()).precision == "bf16"
    folder.keep_precision("bf16")
    folder.begin()
    elsewhere = with_kept(spec(), [EMULATED], folder.precision())
    assert (elsewhere.precision, elsewhere.reason) == ("bf16", "as the run began")
    assert "bf16 is emulated here" in (elsewhere.warning or "")
    folder.keep_precision("fp32")
    assert with_kept(spec(), [NATIVE], folder.precision()) == Decision("fp32", "as the run began")


def test_params_show_what_was_decided_and_what_was_written() -> None:
    asked, decided = spec(), Decision("fp32", "the CPU lacks avx512_bf16")
    assert in_params(asked, decided)["training"]["precision"] == "fp32"
    assert asked.resolved()["training"]["precision"] == "auto"
    named = in_params(spec("quantize", quantize={"precision": "bf16"}), decided)
    assert [named[section]["precision"] for section in ("quantize", "evaluate")] == ["bf16", "fp32"]


def test_the_digest_is_that_of_the_spec_as_written() -> None:
    written = {spec(training={"steps": 1, "precision": value}).digest() for value in ("auto", "bf16", "fp32")}
    assert len(written) == 3
    assert spec().digest() == spec(training={"steps": 1, "precision": "auto"}).digest()
