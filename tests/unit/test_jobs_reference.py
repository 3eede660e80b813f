"""Which model answers are compared with, where one is only measured, and how what it makes of rows is kept."""

from pathlib import Path

import numpy as np
import pytest

from jobs.data import rows
from jobs.driver.reference import made_from
from tracking import manifest
from tracking.errors import TrackingError


def written(folder: Path, parent: str | None, quantised: bool = False) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    said = {"method": "int8-weight-only"} if quantised else None
    told = manifest.ModelManifest(name="x", task="causal-lm", architecture="llama", parent=parent, quantization=said)
    manifest.write(folder, told)
    return folder


def test_a_trained_model_names_what_it_was_trained_from(tmp_path: Path) -> None:
    assert made_from(written(tmp_path / "tuned", "models:/chat/3"), tmp_path) == "models:/chat/3"


def test_a_quantised_model_leads_to_what_its_parent_was_trained_from(tmp_path: Path) -> None:
    written(tmp_path / "tuned", "base")
    assert made_from(written(tmp_path / "small", "tuned", quantised=True), tmp_path) == "base"


def test_a_model_that_says_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"tandem\.json in .*fresh names no parent"):
        made_from(written(tmp_path / "fresh", None), tmp_path)
    with pytest.raises(TrackingError, match=r"no tandem\.json"):
        made_from(tmp_path, tmp_path)


def test_columns_beside_the_rows_belong_to_them_in_every_file(tmp_path: Path) -> None:
    (tmp_path / "beside").mkdir()
    files = [tmp_path / name for name in ("a.arrow", "b.arrow")]
    for start, file in zip((0, 3), files, strict=True):
        numbers = np.arange(start, start + 3, dtype=np.int32)
        rows.write(file, {"ids": np.stack([numbers, numbers], axis=1), "targets": np.ones(3, dtype=np.int32)})
        made = -np.stack([numbers, numbers], axis=1).astype(np.float32)
        rows.write(tmp_path / "beside" / file.name, {"reference": made})
    found = rows.Rows(files, [tmp_path / "beside" / file.name for file in files])
    taken = found.take(np.array([4, 0, 2]))
    assert taken["ids"][:, 0].tolist() == [4, 0, 2]
    assert taken["reference"].tolist() == [[-4, -4], [0, 0], [-2, -2]]
