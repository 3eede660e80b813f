"""A model's folder in a store: put there once and whole, fetched once a node, refused by name where it is another."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from cluster import stored_weights, stores, weights_cache
from cluster.errors import UserError
from jobs.tasks import adapters
from jobs.tasks.causal_lm import CausalLM
from tests.support import s3_server, tiny_models
from tests.support.s3_server import S3Server
from tracking import manifest, model_folder, model_store, weights_digest
from tracking.folder_manifest import StoredFolder

ROOT = Path(__file__).parents[2]
PLACE = "bucket/runs/x/model"
WEIGHTS = f"{PLACE}/model.safetensors"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A store; caches are of this test."""
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(stores, "PAUSE_S", 0.0)
    with s3_server.running(monkeypatch) as server:
        yield server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole model with its weights, and a file below it."""
    fast = tiny_models.tokenizer()
    folder = tiny_models.export(
        tmp_path / "model", fast, tiny_models.decoder("llama", vocab_size=len(fast), num_hidden_layers=1)
    )
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").write_text("as it is")
    return folder


def put_away(model: Path, server: S3Server) -> str:
    model_store.put(model, server.uri(PLACE))
    return server.uri(PLACE)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def partials(home: Path) -> list[Path]:
    return list(home.rglob("*.partial"))


def test_the_small_files_are_fetched_at_once_and_the_weights_when_they_are_wanted(
    model: Path, server: S3Server
) -> None:
    uri = put_away(model, server)
    before = server.sent
    folder = model_store.fetched(uri)
    assert server.sent - before < len(server.objects[WEIGHTS]), "the weights stay where they are"
    there = content(folder)
    said = there.pop("weights.json")
    assert there == {name: each for name, each in content(model).items() if name != "model.safetensors"}
    assert json.loads(said)["files"]["model.safetensors"]["bytes"] == len(server.objects[WEIGHTS])
    manifest.read(folder, verify=True)
    stored_weights.look(folder, "the model")
    assert model_folder.problems(folder) == model_folder.damage(folder) == []
    assert weights_digest.of_folder(folder) == weights_digest.of_folder(model)
    assert content(weights_cache.local(folder))["model.safetensors"] == content(model)["model.safetensors"]
    CausalLM.load(folder).load_model(folder)


def test_a_node_asks_the_store_once(model: Path, server: S3Server) -> None:
    uri = put_away(model, server)
    digest = model_store.put(model, uri)
    first = model_store.fetched(uri, digest)
    weights_cache.local(first)
    sent, server.sends = server.sent, False
    assert model_store.fetched(uri, digest) == first
    assert model_store.is_here(model_store.portable(first))
    assert server.sent == sent


def test_what_names_it_on_this_node_finds_it_on_another(
    model: Path, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_store.fetched(put_away(model, server))
    reference = model_store.portable(folder)
    assert model_store.portable(model) == str(model)
    assert model_store.here(str(model)) == model
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "other"))
    assert not model_store.is_here(reference)
    elsewhere = model_store.here(reference)
    assert elsewhere.is_relative_to(tmp_path / "other")
    assert content(elsewhere) == content(folder)


def test_putting_it_again_changes_nothing_and_mends_what_is_damaged(model: Path, server: S3Server) -> None:
    uri = put_away(model, server)
    before = dict(server.objects)
    digest = model_store.put(model, uri)
    assert server.objects == before
    assert "bucket/runs/x/model/upload.json" not in before
    server.objects[WEIGHTS] = b"x" * len(server.objects[WEIGHTS])
    del server.objects[f"{PLACE}/config.json"]
    assert model_store.put(model, uri) == digest
    assert server.objects == before


def test_nothing_is_overwritten(model: Path, server: S3Server) -> None:
    uri = put_away(model, server)
    before = dict(server.objects)
    (model / "more" / "notes.txt").write_text("otherwise")
    manifest.write(model, manifest.read(model).model_copy(update={"files": {}}))
    with pytest.raises(UserError, match=r"s3://bucket/runs/x/model holds another model already"):
        model_store.put(model, uri)
    server.objects[f"bucket/other/{'config.json'}"] = b"{}"
    with pytest.raises(UserError, match=r"s3://bucket/other/config.json is there, and no upload"):
        model_store.put(model, server.uri("bucket/other"))
    assert {key: each for key, each in server.objects.items() if not key.startswith("bucket/other/")} == before


def test_an_upload_that_was_cut_off_is_no_model_and_is_gone_on_with(model: Path, server: S3Server) -> None:
    uri = put_away(model, server)
    whole = dict(server.objects)
    names = json.dumps({"files": sorted(key.removeprefix(f"{PLACE}/") for key in whole)})
    del server.objects[f"{PLACE}/folder.json"], server.objects[f"{PLACE}/tokenizer.json"]
    server.objects[f"{PLACE}/upload.json"] = names.encode()
    server.objects[WEIGHTS] = b"half"
    with pytest.raises(UserError, match=r"no folder.json at s3://bucket/runs/x/model: no model was put there whole"):
        model_store.fetched(uri)
    model_store.put(model, uri)
    assert server.objects == whole


@pytest.mark.parametrize("damage", [b"short", None])
def test_a_damaged_file_is_named_and_nothing_stays_that_looks_whole(
    model: Path, server: S3Server, tmp_path: Path, damage: bytes | None
) -> None:
    uri = put_away(model, server)
    key = f"{PLACE}/tokenizer.json"
    right = server.objects[key]
    server.objects[key] = damage if damage is not None else b"x" + right[1:]
    for _ in range(2):
        with pytest.raises(UserError, match=r"s3://bucket/runs/x/model/tokenizer.json is not what was put there"):
            model_store.fetched(uri)
    assert partials(tmp_path / "home") == []
    assert not any(path.is_dir() for path in (tmp_path / "home" / "cache" / "models").iterdir())
    server.objects[key] = right
    assert (model_store.fetched(uri) / "tokenizer.json").read_bytes() == right


def test_a_missing_file_and_damaged_weights_are_named(model: Path, server: S3Server) -> None:
    uri = put_away(model, server)
    digest = model_store.put(model, uri)
    server.objects[WEIGHTS] = b"x" + server.objects[WEIGHTS][1:]
    folder = model_store.fetched(uri)
    with pytest.raises(UserError, match=r"s3://bucket/runs/x/model/model.safetensors is not what was exported"):
        weights_cache.local(folder)
    with pytest.raises(UserError, match=r"s3://bucket/runs/x/model/model.safetensors is not what was exported"):
        model_store.verify(uri, digest)
    shutil.rmtree(folder)
    del server.objects[f"{PLACE}/config.json"]
    with pytest.raises(UserError, match=r"s3://bucket/runs/x/model/config.json.*it is not there"):
        model_store.fetched(uri)


def test_another_model_at_the_place_is_refused_where_the_digest_is_known(
    model: Path, server: S3Server, tmp_path: Path
) -> None:
    uri = put_away(model, server)
    digest = model_store.put(model, uri)
    server.objects.clear()
    (model / "more" / "notes.txt").write_text("otherwise")
    (model / "tandem.json").unlink()
    model_store.put(model, uri)
    with pytest.raises(UserError, match=r"s3://bucket/runs/x/model holds another model than was registered"):
        model_store.fetched(uri, digest)
    assert (model_store.fetched(uri) / "more" / "notes.txt").read_text() == "otherwise"


def test_what_was_removed_from_the_cache_is_fetched_again(model: Path, server: S3Server) -> None:
    uri = put_away(model, server)
    folder = model_store.fetched(uri)
    before = content(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_bytes(b"")
    assert content(model_store.fetched(uri, model_store.portable(folder).partition("#")[2])) == before


def test_a_full_disk_is_told_before_the_first_byte(
    model: Path, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = put_away(model, server)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(UserError, match=r"do not fit in .*GB free: remove .*TANDEM_HOME"):
        model_store.fetched(uri)
    assert partials(tmp_path / "home") == []


def test_processes_of_a_node_fetch_it_once(model: Path, server: S3Server) -> None:
    uri = put_away(model, server)
    before, small = server.sent, len(server.objects[f"{PLACE}/tokenizer.json"])
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        folders = set(pool.map(model_store.fetched, [uri] * 4))
    assert len(folders) == 1
    rest = sum(len(each) for key, each in server.objects.items() if key not in (WEIGHTS, f"{PLACE}/folder.json"))
    manifests = 4 * len(server.objects[f"{PLACE}/folder.json"])
    assert small < server.sent - before <= rest + manifests


def test_weights_that_lie_in_a_store_already_stay_there(model: Path, server: S3Server, tmp_path: Path) -> None:
    folder = model_store.fetched(put_away(model, server))
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    uri = server.uri("bucket/enrolled")
    model_store.put(copy, uri)
    assert "bucket/enrolled/model.safetensors" not in server.objects
    again = weights_cache.local(model_store.fetched(uri))
    assert content(again)["model.safetensors"] == content(model)["model.safetensors"]


def test_a_folder_that_is_not_what_its_manifest_says_is_not_put(model: Path, server: S3Server) -> None:
    (model / "config.json").write_text("{}  ")
    with pytest.raises(UserError, match=r"config.json"):
        put_away(model, server)
    assert server.objects == {}


def test_adapters_find_their_base_in_the_store_on_every_node(
    model: Path, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model_store.fetched(put_away(model, server))
    apart = tmp_path / "apart"
    apart.mkdir()
    (apart / adapters.CONFIG).write_text("{}")
    adapters.Base(model_store.portable(base), weights_digest.of_folder(base)).write(apart)
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "other"))
    found = adapters.base_of(apart)
    assert found is not None
    assert content(found) == content(base)
    model_folder.check_base(apart)
    assert model_folder.problems(apart) == []


@pytest.mark.parametrize(
    "files",
    [
        {"../evil": {"bytes": 1, "sha256": "0" * 64}},
        {"/etc/evil": {"bytes": 1, "sha256": "0" * 64}},
        {"a/../../evil": {"bytes": 1, "sha256": "0" * 64}},
        {"config.json": {"bytes": -1, "sha256": "0" * 64}},
        {"config.json": {"bytes": 1, "sha256": "../x"}},
        {"config.json": {"bytes": 1, "elements": 1, "sha256": "0" * 64}},
    ],
)
def test_what_no_upload_writes_is_refused(files: dict[str, object]) -> None:
    text = json.dumps({"format": 1, "files": files}, indent=1, sort_keys=True) + "\n"
    with pytest.raises(UserError, match=r"does not say what the model's folder holds"):
        StoredFolder.parsed(text, "s3://bucket/m/folder.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "files": []}', '{"format": 1, "files": {"a": {}}}'])
def test_a_damaged_manifest_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"s3://bucket/m/folder.json does not say"):
        StoredFolder.parsed(text, "s3://bucket/m/folder.json")


def test_a_manifest_of_a_newer_tandem_is_refused() -> None:
    with pytest.raises(UserError, match=r"format 2.*update"):
        StoredFolder.parsed('{"format": 2, "files": {}}', "s3://bucket/m/folder.json")


KILLED = """
import os, signal, sys
from tracking import model_store
from tracking.store_folder import Folder

fetch, fetched = Folder.fetch, []

def then_dies(self, name, target, added):
    fetched.append(fetch(self, name, target, added))
    if len(fetched) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return fetched[-1]

Folder.fetch = then_dies
model_store.fetched(sys.argv[1])
"""


def test_a_killed_fetch_leaves_nothing_that_looks_whole(model: Path, server: S3Server, tmp_path: Path) -> None:
    uri = put_away(model, server)
    died = subprocess.run([sys.executable, "-c", KILLED, uri], check=False, cwd=ROOT)
    assert died.returncode == -signal.SIGKILL
    assert len(partials(tmp_path / "home")) == 1
    digest = model_store.put(model, uri)
    folder = model_store.fetched(uri, digest)
    assert len(content(folder)) == len(content(model))
    assert partials(tmp_path / "home") == []
