"""Models whose weights lie in a store (model.export): each opener finds them, and what is not theirs is refused."""

from __future__ import annotations

import asyncio
import fcntl
import json
import queue
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster import stored_weights, stores, weights_cache
from cluster.errors import UserError
from jobs import lineage, parents
from jobs.driver import storage
from jobs.spec import JobSpec
from jobs.tasks.causal_lm import CausalLM
from jobs.worker import elsewhere, quantize, start
from jobs.worker.elsewhere import Elsewhere, StoreFailed
from serve.deploy import plan
from serve.deploy.model_replica import load_replica
from serve.spec import ServeSpec
from serve.wire import InferCall
from tests.support import adapters_apart, s3_server, tiny_models
from tests.support.s3_server import S3Server
from tracking import manifest, model_folder

KEY = "bucket/models/run/1/model.safetensors"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A store; caches are of this test."""
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(stores, "PAUSE_S", 0.0)
    with s3_server.running(monkeypatch) as server:
        yield server


def put_away(directory: Path, store: str) -> Path:
    """Bring a model's weights to a store, as an export does; return a copy of the folder that has them still."""
    whole = directory.with_name(f"{directory.name}-whole")
    shutil.copytree(directory, whole)
    contract = manifest.read(directory)
    Elsewhere(store, "run/1").move(directory)
    manifest.write(directory, contract)
    return whole


@pytest.fixture
def decoder(tmp_path: Path, server: S3Server) -> Path:
    """A decoder in the store; `decoder-whole` beside it has its weights."""
    fast = tiny_models.tokenizer()
    model = tiny_models.decoder("llama", vocab_size=len(fast), num_hidden_layers=1)
    folder = tiny_models.export(tmp_path / "decoder", fast, model)
    put_away(folder, server.uri("bucket/models"))
    return folder


def whole(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-whole")


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = state(one), state(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_is_fetched_once_and_loads_as_what_was_exported(decoder: Path, server: S3Server) -> None:
    before = server.sent
    task = CausalLM.load(decoder)
    assert same(task.load_model(decoder), task.load_model(whole(decoder)))
    assert same(task.load_model(decoder), task.load_model(whole(decoder)))
    assert server.sent - before == len(server.objects[KEY])
    shutil.rmtree(decoder.parent / "home" / "cache")
    assert same(task.load_model(decoder), task.load_model(whole(decoder)))
    assert server.sent - before == 2 * len(server.objects[KEY])


def test_a_copy_follows_its_folder(decoder: Path) -> None:
    first = weights_cache.local(decoder)
    assert weights_cache.local(decoder) == first
    (decoder / "gallery.json").write_text("{}")
    second = weights_cache.local(decoder)
    assert (second / "gallery.json").is_file()
    assert not (first / "gallery.json").exists()
    assert (first / "model.safetensors").samefile(second / "model.safetensors")


def test_weights_that_lie_beside_are_taken_as_they_are(decoder: Path, server: S3Server) -> None:
    shutil.copy(whole(decoder) / "model.safetensors", decoder)
    server.objects.clear()
    assert weights_cache.local(decoder) == decoder


def test_slices_adapters_digests_and_sizes_are_those_of_the_whole(decoder: Path, tmp_path: Path) -> None:
    assert lineage.weights_digest(decoder) == lineage.weights_digest(whole(decoder))
    assert quantize._weight_bytes(decoder) == quantize._weight_bytes(whole(decoder))
    assert model_folder.problems(decoder) == model_folder.damage(decoder) == []
    begun = start.described_by(decoder, CausalLM.load(decoder))
    assert not isinstance(begun, str)
    begun.materialise()
    begun.close()
    assert same(begun.model, CausalLM.load(decoder).load_model(whole(decoder), torch.float32))
    apart = adapters_apart.written(decoder, tmp_path / "apart", "all-linear")
    adapted = CausalLM.load(apart).load_model(apart)
    (apart / "base.json").write_text((apart / "base.json").read_text().replace(str(decoder), str(whole(decoder))))
    assert same(adapted, CausalLM.load(apart).load_model(apart))


def test_it_is_served(tmp_path: Path, server: S3Server) -> None:
    folder = tiny_models.image_classifier(tmp_path / "shapes")
    put_away(folder, server.uri("bucket/models"))
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)

    async def ask(directory: Path) -> object:
        (planned,) = plan.resolve(ServeSpec.model_validate({"models": {"m": {"model": str(directory)}}}))
        replica = load_replica(planned)
        await replica.start()
        answer = await replica.infer(InferCall("1", {"image": images}))  # type: ignore[attr-defined]
        await replica.stop()
        return answer.predictions

    assert asyncio.run(ask(folder)) == asyncio.run(ask(whole(folder)))


def test_another_content_is_refused_with_its_address_and_not_kept(decoder: Path, server: S3Server) -> None:
    content = server.objects[KEY]
    server.objects[KEY] = content[:-1] + bytes([content[-1] ^ 1])
    said = r"s3://bucket/models/run/1/model\.safetensors is not what was exported: .*SHA-256"
    for call in (weights_cache.local, stored_weights.verify):
        with pytest.raises(UserError, match=said):
            call(decoder)
    assert list((decoder.parent / "home" / "cache" / "weights").glob("*.safetensors")) == []
    server.objects[KEY] = content
    stored_weights.verify(decoder)
    assert (weights_cache.local(decoder) / "model.safetensors").read_bytes() == content


def test_what_is_gone_or_cut_is_refused_before_anything_starts(decoder: Path, server: S3Server) -> None:
    job = JobSpec.model_validate(
        {"name": "x", "phase": "evaluate", "model": {"from": str(decoder)}, "data": {"eval": "x.jsonl"}}
        | {"task": {"name": "causal-lm", "sequence_length": 64}}
    )
    assert parents.find(job, decoder.parent) == decoder
    content = server.objects.pop(KEY)
    gone = r"s3://bucket/models/run/1/model\.safetensors, which holds weights of the model, cannot be read: it is no"
    with pytest.raises(UserError, match=gone):
        parents.find(job, decoder.parent)
    with pytest.raises(UserError, match=gone):
        CausalLM.load(decoder).load_model(decoder)
    server.objects[KEY] = content[:-8]
    with pytest.raises(UserError, match=r"models\.m: s3://bucket.* is not what was exported: it has \d+ bytes"):
        plan.resolve(ServeSpec.model_validate({"models": {"m": {"model": str(decoder)}}}))


def test_what_the_disk_has_no_room_for_is_not_begun(decoder: Path, server: S3Server) -> None:
    path, before = decoder / "weights.json", server.sent
    about = json.loads(path.read_text())
    about["files"]["model.safetensors"]["bytes"] = 10**18
    path.write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"1e\+09 GB of weights from s3://bucket/models/run/1 do not fit in "):
        weights_cache.local(decoder)
    assert server.sent == before


def test_a_process_waits_for_another_that_fetches(
    decoder: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = stored_weights.read(decoder)
    assert stored is not None
    blobs = decoder.parent / "home" / "cache" / "weights"
    blobs.mkdir(parents=True)
    told: queue.SimpleQueue[str] = queue.SimpleQueue()  # what pytest captures is lost where a thread writes meanwhile
    monkeypatch.setattr(weights_cache, "_say", told.put)
    name, before = stored.files["model.safetensors"].sha256, server.sent
    with (blobs / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=weights_cache.local, args=(decoder,))
        thread.start()
        assert "waiting for the process that fetches s3://bucket/models/run/1/model.safetensors" in told.get(timeout=60)
        shutil.copy(whole(decoder) / "model.safetensors", blobs / f"{name}.safetensors")
    thread.join()
    assert server.sent == before, "the other one has fetched it"


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about["files"].update({"../x.safetensors": about["files"]["model.safetensors"]}),
        lambda about: about["files"].update({"config.json": about["files"]["model.safetensors"]}),
        lambda about: about["files"]["model.safetensors"].update(bytes=-1),
        lambda about: about["files"]["model.safetensors"].update(sha256="../../x"),
        lambda about: about.update(folder="../other"),
        lambda about: about.update(files={}),
        lambda about: about.pop("store"),
    ],
)
def test_a_folder_that_says_anything_else_is_refused(decoder: Path, change: object) -> None:
    path = decoder / "weights.json"
    about = json.loads(path.read_text())
    change(about)  # type: ignore[operator]
    path.write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"weights\.json does not say where the weights are"):
        weights_cache.local(decoder)


def test_a_store_that_fails_for_a_moment_is_asked_again_and_one_that_goes_on_leaves_the_weights_here(
    tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "PAUSE_S", 0.01)
    for failures, patience_s in ((4, 60.0), (1000, 0.5)):  # the client itself asks three times
        monkeypatch.setattr(stores, "PATIENCE_S", patience_s)
        folder = tiny_models.image_classifier(tmp_path / f"shapes-{failures}")
        place = Elsewhere(server.uri("bucket/models"), f"run/{failures}")
        server.failing = failures
        if failures == 4:
            place.move(folder)
        else:
            with pytest.raises(
                StoreFailed, match=r"model\.export: the weights could not be written to s3://bucket/mod"
            ):
                place.move(folder)
            assert not [key for key in server.objects if "run/1000" in key], "nothing half written is left"
            server.failing = 0
        assert (folder / "model.safetensors").exists() == (failures > 4)


def test_a_large_file_goes_in_parts_and_files_of_a_disk_do_too(tmp_path: Path, server: S3Server) -> None:
    block = bytes(range(256)) * (1 << 14)
    for root in (server.uri("bucket/models"), f"file://{tmp_path}/store", str(tmp_path / "other")):
        place = Elsewhere(root, "run/1")
        with place.stream("model.safetensors") as file:
            for _ in range(6):
                file.write(memoryview(block))
        content = b"".join(stored_weights.chunks(stored_weights.Stored(root, "run/1", {}), "model.safetensors"))
        assert content == block * 6
    assert server.parts > 1
    assert server.uploads == {}


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("s3://key:secret@bucket/a@b/c?endpoint_override=host:9000", "s3://bucket/a@b/c"),
        ("abfs://box:secret@account.dfs.core.windows.net/a", "abfs://box@account.dfs.core.windows.net/a"),
        ("abfs://:secret@account.blob.core.windows.net/box", "abfs://account.blob.core.windows.net/box"),
        ("file:///a/b", "file:///a/b"),
        ("/a?b/c@d", "/a?b/c@d"),
    ],
)
def test_a_place_is_shown_without_a_password(place: str, shown: str) -> None:
    assert stores.shown(place) == shown
    assert stored_weights.Stored(place, "run/1", {}).uri("x") == f"{shown}/run/1/x"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"export": "models"}, r"'models' is neither a URI \(s3://bucket/models\) nor an absolute path"),
        ({"export": "s3://key:secret@bucket/x"}, "a password would be written beside every model"),
        ({"export": "s3://b/x", "lora": {"merge": False}}, r"adapters that are kept apart .* stay in the job's folder"),
    ],
)
def test_places_that_cannot_be_honoured_are_refused(model: dict, said: str) -> None:
    values = {"name": "x", "phase": "finetune", "data": {"train": "x"}, "training": {"steps": 1}}
    with pytest.raises(ValueError, match=rf"(?s)model\.export.*{said}"):
        JobSpec.model_validate({**values, "model": {"from": "y", **model}})
    for phase in ("evaluate", "quantize"):
        with pytest.raises(ValueError, match=f"phase {phase} exports nothing to a store"):
            JobSpec.model_validate(
                {"name": "x", "phase": phase, "data": {"eval": "x"}, "model": {"from": "y", "export": "s3://b/x"}}
            )


def test_a_place_that_takes_nothing_is_named_before_anything_starts_and_decides_no_result(
    tmp_path: Path, server: S3Server
) -> None:
    values = {"name": "x", "phase": "pretrain", "data": {"train": "x"}, "training": {"steps": 1}}
    spec = lambda place: JobSpec.model_validate(  # noqa: E731
        {**values, "storage": str(tmp_path), "model": {"architecture": "llama", "export": place}}
    )
    storage.check(spec(server.uri("bucket/models")), tmp_path)
    with pytest.raises(storage.NotWritable, match=r"^model\.export: s3://refused/x.* cannot be written: "):
        storage.check(spec(server.uri("refused/x")), tmp_path)
    assert spec(server.uri("bucket/models")).digest() == spec(None).digest()


def test_what_exports_have_left_is_removed_but_for_the_model_s_own(decoder: Path, server: S3Server) -> None:
    from jobs.run_folder import RunFolder

    run = RunFolder(decoder.parent / "a-run")
    shutil.copytree(decoder, run.model)
    root = server.uri("bucket/models")
    server.objects["bucket/models/run/2/model.safetensors"] = b"half"
    elsewhere.note(run, [(root, "run/1"), (root, "run/2")])
    elsewhere.remove_left(run)
    assert elsewhere.noted(run) == [(root, "run/1")]
    assert [key for key in server.objects if not key.endswith("/")] == [KEY]


def test_an_export_that_was_superseded_leaves_alone_what_the_newer_one_writes(decoder: Path, server: S3Server) -> None:
    from jobs.run_folder import RunFolder

    run, root = RunFolder(decoder.parent / "a-run"), server.uri("bucket/models")
    run.path.mkdir()
    newer, theirs = (root, "a-run/newer"), "bucket/models/a-run/newer/model.safetensors"

    def superseded() -> None:
        with elsewhere.begun(root, run, True, lambda: None) as place:
            assert place is not None
            with place.stream("model.safetensors") as file:
                file.write(b"whole")
            server.objects[theirs] = b"half"
            elsewhere.note(run, [*elsewhere.noted(run), newer])
            raise KeyError("as check_newest does")

    with pytest.raises(KeyError, match="check_newest"):
        superseded()
    assert elsewhere.noted(run) == [newer]
    assert [key for key in server.objects if "/a-run/" in key and not key.endswith("/")] == [theirs]
