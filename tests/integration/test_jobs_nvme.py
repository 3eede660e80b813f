"""Training state and parameters on NVMe, on two ranks with real files.

What has optimizer states there is not run where libaio's headers are not installed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.worker import async_io
from tests.support import two_ranks
from tests.support.machine import can_swap

PRECISIONS = ("fp32", "bf16")
PLACES = (("cpu", "-parameters"), ("nvme", ""), ("nvme", "-parameters"))
"""Where optimizer states are, and whether parameters are on NVMe."""
CASES = [(offload, precision, also) for precision in PRECISIONS for offload, also in PLACES]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks hold after four steps, unbroken and resumed after two, in memory and on NVMe."""
    folder = tmp_path_factory.mktemp("nvme")
    cases = [f"{offload}-{precision}{also}" for offload, precision, also in CASES if offload == "cpu" or can_swap()]
    two_ranks.run("nvme_ranks", folder, [*(f"cpu-{precision}" for precision in PRECISIONS), *cases], timeout_s=580)
    return folder


def ran(trained: Path, case: str) -> str:
    if not (trained / case).exists():
        assert case.startswith("nvme-")
        pytest.skip("not run: libaio-dev is not installed")
    return case


def both_ranks(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return {key: part for rank in range(2) for key, part in load_file(folder / f"{name}-{rank}.safetensors").items()}


@pytest.mark.parametrize(("offload", "precision", "also"), CASES)
@pytest.mark.parametrize("when", ["unbroken", "resumed"])
def test_what_is_learned_on_nvme_is_what_is_learned_in_memory(
    trained: Path, offload: str, precision: str, also: str, when: str
) -> None:
    case = ran(trained, f"{offload}-{precision}{also}")
    expected, found = both_ranks(trained, f"cpu-{precision}-unbroken"), both_ranks(trained, f"{case}-{when}")
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert float(tensor.norm()) > 0, key
        assert torch.equal(tensor, found[key]), key


@pytest.mark.parametrize(("offload", "precision", "also"), CASES)
def test_the_weights_to_export_are_those_in_the_files(trained: Path, offload: str, precision: str, also: str) -> None:
    case = ran(trained, f"{offload}-{precision}{also}")
    weights, state = load_file(trained / f"{case}-weights.safetensors"), both_ranks(trained, f"{case}-unbroken")
    expected = load_file(trained / f"cpu-{precision}-weights.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    for key, masters in state.items():
        kind, name, start = key.split("|")
        if kind == "weight":
            there = weights[name].flatten()[int(start) : int(start) + masters.numel()]
            assert torch.equal(there, masters.to(there.dtype)), key


def test_a_node_that_one_rank_refuses_is_refused_by_all_before_any_writes(trained: Path) -> None:
    first, second = ((trained / f"refused-{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert re.search(r"nvme_path: .* has [\d,]+ MiB free, and its 2 workers keep 1,907,348,632 MiB there", first)


def test_nothing_is_left_on_the_disk(trained: Path) -> None:
    assert list(trained.glob("*-unbroken-0.safetensors")), "ranks have held folders there"
    assert list(trained.glob("tandem-*")) == []


def test_a_machine_that_cannot_build_it_is_told_what_to_install(tmp_path: Path) -> None:
    code = "from jobs.worker import async_io; async_io.ready()"
    environment = {**os.environ, "CC": "/bin/false", "DS_ACCELERATOR": "cpu", async_io.VARIABLE: str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "UserError: training.deepspeed.offload: nvme needs libaio on the node" in done.stderr
    assert "sudo apt-get install libaio-dev" in done.stderr
