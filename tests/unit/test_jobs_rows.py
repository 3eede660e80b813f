"""Rows of many files are read as one, and take no memory, no open files and few maps of a process."""

import contextlib
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from jobs.data import rows


def written(folder: Path, lengths: list[int], **more: np.ndarray) -> list[Path]:
    """Write files of rows that are numbered throughout; `more` are columns of the last one."""
    files, starts = [folder / f"{number}.arrow" for number in range(len(lengths))], np.cumsum([0, *lengths])
    for file, start, length in zip(files, starts, lengths, strict=False):
        numbers = np.arange(start, start + length, dtype=np.int32)
        columns = {"pair": np.stack([numbers, -numbers], axis=1), "targets": numbers}
        rows.write(file, columns | (more if file == files[-1] else {}))
    return files


def mapped_below(folder: Path) -> int:
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def open_below(folder: Path) -> int:
    """Return how many open files of this process lie in a folder: other tests' threads open and close their own."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{number}").startswith(str(folder))
    return found


def test_rows_are_read_alike_however_few_files_are_mapped(tmp_path: Path) -> None:
    files = written(tmp_path, [3, 1, 7, 2] * 10)
    wanted = np.random.Generator(np.random.PCG64(1)).integers(0, 130, 200)
    few = rows.Rows(files, mapped=3)
    assert mapped_below(tmp_path) <= 3
    assert np.array_equal(few.take(wanted)["pair"], np.stack([wanted, -wanted], axis=1))
    assert few.targets(wanted) == wanted.sum()
    assert mapped_below(tmp_path) <= 3
    many = rows.Rows(files)
    assert mapped_below(tmp_path) >= 40, "else this test would see nothing"
    assert np.array_equal(many.take(wanted)["pair"], few.take(wanted)["pair"])
    assert open_below(tmp_path) == 0
    with files[0].open("rb"):
        assert open_below(tmp_path) == 1, "else this test would see nothing"


def test_nothing_is_kept_of_a_row(tmp_path: Path) -> None:
    rows.write(tmp_path / "0.arrow", {"targets": np.ones(10**6, dtype=np.int32)})
    rows.write(tmp_path / "1.arrow", {"targets": np.ones(10**6, dtype=np.int32)})
    tracemalloc.start()
    read = rows.Rows([tmp_path / "0.arrow", tmp_path / "1.arrow"])
    assert read.targets(np.arange(0, 2 * 10**6, 1000)) == 2000
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()


def test_what_only_some_files_have_is_zero_in_the_others(tmp_path: Path) -> None:
    read = rows.Rows(written(tmp_path, [2, 3], weight=np.array([[1.5], [2.5], [3.5]], dtype=np.float32)))
    assert read.columns == {"pair", "targets", "weight"}
    assert read.take(np.array([4, 0, 2]))["weight"].tolist() == [[3.5], [0.0], [1.5]]
    assert read.take(np.array([1]))["weight"].tolist() == [[0.0]]
    taken = read.take(np.array([3]))["weight"]
    taken[:] = 9
    assert read.take(np.array([3]))["weight"].tolist() == [[2.5]], "what is taken is a copy"


def test_columns_of_other_widths_are_not_put_together(tmp_path: Path) -> None:
    for name, width in (("0.arrow", 1), ("1.arrow", 4)):
        rows.write(tmp_path / name, {"ids": np.ones((2, width), np.int32), "targets": np.ones(2, np.int32)})
    with pytest.raises(ValueError, match="must match exactly"):
        rows.Rows([tmp_path / "0.arrow", tmp_path / "1.arrow"]).take(np.array([0, 3]))
