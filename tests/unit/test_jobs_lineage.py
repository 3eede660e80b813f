"""A run goes on from the weights that it began from, and a model names the version it was made from."""

import os

import pytest

from cluster.errors import UserError
from jobs import lineage
from tests.support import hub
from tracking import weights_digest


@pytest.fixture
def parent(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"rope_theta": 10000}')
    (folder / "model.safetensors").write_bytes(os.urandom(4096))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_that_changed_under_a_run_is_refused(parent, name):
    before = lineage.weights_digest(parent)
    lineage.check_same(before, lineage.weights_digest(parent), "models:/m@a")
    content = bytearray((parent / name).read_bytes())
    content[10] ^= 1
    (parent / name).write_bytes(content)
    with pytest.raises(UserError, match=r"the weights behind model.from \(models:/m@a\) changed.*resume=never"):
        lineage.check_same(before, lineage.weights_digest(parent), "models:/m@a")


def test_what_weights_do_not_depend_on_changes_nothing(parent):
    before = lineage.weights_digest(parent)
    (parent / "tokenizer.json").write_text('{"other": 1}')
    assert lineage.weights_digest(parent) == before


def test_pages_all_over_a_large_file_are_read(parent, monkeypatch):
    monkeypatch.setattr(weights_digest, "WHOLE", 1 << 16)
    monkeypatch.setattr(weights_digest, "PAGES", 16)
    file = parent / "model.safetensors"
    content = bytearray(1 << 17)
    file.write_bytes(content)
    before = lineage.weights_digest(parent)
    content[-1] = 1
    file.write_bytes(content)
    assert lineage.weights_digest(parent) != before
    (said,) = lineage.said_of_pages(parent)
    assert "model.safetensors of model.from" in said
    assert "16 pages all over it" in said
    (parent / "model-2.safetensors").write_bytes(content)
    assert lineage.said_of_pages(parent)[0].startswith("model-2.safetensors and 1 more files of model.from")


def test_nothing_is_said_of_files_that_are_read_whole(parent):
    assert lineage.said_of_pages(parent) == lineage.said_of_pages("owner/name") == lineage.said_of_pages(None) == []


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    hub.use(tmp_path / "cache", monkeypatch)
    assert lineage.weights_digest("owner/name") == ""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "config.json").write_text("{}")
    hub.keep(tmp_path / "cache", "owner/name", tmp_path / "files")
    assert lineage.weights_digest("owner/name") == hub.COMMIT


def test_what_was_not_noted_is_not_held_against_a_run():
    lineage.check_same("", "abc", None)
    lineage.check_same("abc", "", "a hub id")
    assert lineage.weights_digest("owner/name") == "" == lineage.weights_digest(None)
    assert lineage.pinned("owner/name") == "owner/name"
