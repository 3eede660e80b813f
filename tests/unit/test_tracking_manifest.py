"""The model contract: written whole, and every kind of damage is noticed and named."""

import json
from pathlib import Path

import pytest

from cluster.errors import UserError
from tracking import manifest
from tracking.errors import TrackingError
from tracking.manifest import DatasetRef, ModelManifest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "nested").mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 10)
    (directory / "nested" / "config.json").write_text("{}")
    written = ModelManifest(
        name="digits",
        task="image-classification",
        architecture="cnn",
        dataset=DatasetRef(name="digits", digest="abc"),
        evaluation={"accuracy": 0.9},
    )
    manifest.write(directory, written)
    return directory


def edit(directory: Path, **changes: object) -> None:
    path = directory / "tandem.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_manifest_comes_back_as_it_was_written(model: Path) -> None:
    read = manifest.read(model, verify=True)
    assert (read.name, read.task, read.evaluation) == ("digits", "image-classification", {"accuracy": 0.9})
    assert read.dataset == DatasetRef(name="digits", digest="abc")
    assert set(read.files) == {"model.safetensors", "nested/config.json"}
    assert read.files["model.safetensors"].bytes == 2560
    assert read.created_at.endswith("+00:00")
    assert sorted(path.name for path in model.iterdir()) == ["model.safetensors", "nested", "tandem.json"]


def test_writing_again_digests_the_files_anew(model: Path) -> None:
    before = manifest.read(model)
    (model / "model.safetensors").write_bytes(b"other weights")
    after = manifest.write(model, before)
    assert after.files["model.safetensors"].bytes == len(b"other weights")
    assert manifest.read(model, verify=True) == after


def test_a_flipped_bit_is_found_when_verifying(model: Path) -> None:
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    manifest.read(model)
    with pytest.raises(TrackingError, match=r"model\.safetensors is corrupt"):
        manifest.read(model, verify=True)


def test_truncated_and_missing_files_are_found_without_reading_them(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"short")
    with pytest.raises(TrackingError, match=r"model\.safetensors has 5 bytes, tandem\.json says 2560"):
        manifest.read(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(TrackingError, match=r"model\.safetensors is missing"):
        manifest.read(model)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "nested/../../secret"])
def test_a_listed_path_cannot_leave_the_directory(model: Path, name: str) -> None:
    (model.parent / "secret").write_bytes(b"x")
    edit(model, files={name: {"bytes": 1, "sha256": "0"}})
    with pytest.raises(TrackingError, match="outside the model directory"):
        manifest.read(model)


def test_a_link_cannot_leave_the_directory(model: Path) -> None:
    (model.parent / "secret").write_bytes(b"x")
    (model / "link").symlink_to(model.parent / "secret")
    with pytest.raises(TrackingError, match="outside the model directory"):
        manifest.write(model, manifest.read(model))


@pytest.mark.parametrize("name", ["../evil", "a/b", "a%2fb", "", ".hidden"])
def test_a_name_that_is_no_path_component_is_refused(model: Path, name: str) -> None:
    with pytest.raises(UserError, match="not a valid name"):
        manifest.write(model, manifest.read(model).model_copy(update={"name": name}))


def test_no_manifest_broken_json_and_a_newer_format_say_which(model: Path) -> None:
    edit(model, format=2)
    with pytest.raises(TrackingError, match="update Tandem"):
        manifest.read(model)
    (model / "tandem.json").write_text("{")
    with pytest.raises(TrackingError, match="not readable as a model manifest"):
        manifest.read(model)
    (model / "tandem.json").unlink()
    with pytest.raises(TrackingError, match=r"no tandem\.json in"):
        manifest.read(model)
