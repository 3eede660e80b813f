"""Which model answers are compared with where a model is only measured: the one that it was made from."""

from pathlib import Path

import pytest

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
