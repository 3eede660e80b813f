"""What is written of a part of a parameter is read back bit for bit, or the failure is told."""

from pathlib import Path

import pytest
import torch

from jobs.worker import parameter_files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_comes_back_bit_for_bit_and_newer_ones_replace_it(tmp_path: Path, dtype: torch.dtype) -> None:
    part, found = torch.randn(1031).to(dtype), torch.full((1031,), torch.nan, dtype=dtype)
    for each in (part, -part):
        parameter_files.write(tmp_path / "7", each)
        parameter_files.read(tmp_path / "7", found)
        assert torch.equal(found, each)
    assert (tmp_path / "7").stat().st_size == 1031 * dtype.itemsize


def test_a_file_that_has_lost_bytes_is_named(tmp_path: Path) -> None:
    parameter_files.write(tmp_path / "7", torch.ones(100))
    with (tmp_path / "7").open("r+b") as file:
        file.truncate(396)
    with pytest.raises(parameter_files.Failed, match=r"396 bytes, not the 400 of a part of a parameter: '.*/7'"):
        parameter_files.read(tmp_path / "7", torch.empty(100))
    with pytest.raises(parameter_files.Failed, match=r"No such file or directory: '.*/8'"):
        parameter_files.read(tmp_path / "8", torch.empty(100))


def test_a_full_disk_is_named() -> None:
    with pytest.raises(parameter_files.Failed, match="No space left on device: '/dev/full'"):
        parameter_files.write(Path("/dev/full"), torch.ones(100))
