"""A run has one owner, what it leaves can be written, and what cannot be read is said once."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from cluster import connect
from jobs import submit
from tests.support import fault_runs as faults
from tests.support.fault_runs import ended, run, submitted

pytestmark = pytest.mark.usefixtures("cluster")


def test_the_same_spec_submitted_twice_at_once(folder, storage):
    fault = "pace:rank=0:step=1"
    first = submitted(folder, "owners", "resources.workers=1", fault=fault)
    second = submitted(folder, "owners", "resources.workers=1", fault=fault)
    found = {job: ended(job, storage, "owners") for job in (first, second)}
    (owner,) = [job for job in found if found[job].status == "SUCCEEDED"]
    (refused,) = [job for job in found if job != owner]
    assert found[refused].status == "FAILED"
    (said,) = [line for line in found[refused].log if "works on the run" in line]
    assert said.startswith(f"tandem: error: job {owner} works on the run {found[owner].folder.name} since ")
    assert f"tandem jobs logs {owner} --follow" in said
    assert sorted(found[owner].losses()) == list(range(1, 41)), "each step once"
    assert faults.steps_of(found[owner].folder) == 40
    assert found[owner].run.info.status == "FINISHED"


@pytest.mark.parametrize("key", ["storage", "checkpoint.directory"])
def test_a_place_that_cannot_be_written_ends_a_job_before_it_begins(folder, storage, key):
    (folder / "a-file").write_text("")
    job = submitted(folder, f"nowhere-{key.partition('.')[0]}", f"{key}={folder}/a-file/below")
    log: list[str] = []
    outcome = submit.follow(job, lambda line, meaning: log.append(line))
    assert outcome.status == "FAILED"
    reason = f"{folder}/a-file is a file"
    assert outcome.error.startswith(f"{key}: {folder}/a-file/below cannot be written: {reason}; mend that")
    assert "Traceback" not in "\n".join(log)
    assert not list((storage / "runs").glob("nowhere-*"))


def test_a_job_that_could_save_nothing_ends_so_and_leaves_its_model(folder, storage):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    small = Path(os.path.realpath(folder)) / "tiny"
    small.mkdir()
    assert os.system(f"mount -t tmpfs -o size=64k tmpfs {small}") == 0
    try:
        settings = [f"checkpoint.directory={small}", "checkpoint.every_steps=20", "resources.workers=1"]
        found = run(folder, storage, "unsaved", *settings)
        assert not list(small.rglob("MANIFEST.json"))
    finally:
        os.system(f"umount {small}")
    assert found.status == "FAILED"
    assert found.result["checkpoints_failed"] == 2
    assert (found.folder / "model" / "model.safetensors").is_file()
    (said,) = [line for line in found.log if line.startswith("tandem: error: ")]
    assert said.startswith(
        f"tandem: error: the model is in {found.folder / 'model'}, but no checkpoint could be saved: "
    )
    assert "No space left" in said
    assert found.run.info.status == "FAILED"
    assert found.run.data.tags["tandem.checkpoints_failed"] == "2"


def test_a_disk_that_is_full_while_a_job_runs(folder):
    """The group cannot be started again there: the job ends, says why, and goes on when there is room."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    small = Path(os.path.realpath(folder)) / "filling"
    small.mkdir()
    assert os.system(f"mount -t tmpfs -o size=40m tmpfs {small}") == 0
    settings = [f"storage={small}", "resources.workers=1", "max_failures=0"]

    def fill(line: str) -> None:
        if "tandem: train " in line and not (small / "ballast").exists():
            with suppress(OSError), (small / "ballast").open("wb", buffering=0) as ballast:
                while ballast.write(bytes(4096)):
                    pass

    try:
        found = ended(submitted(folder, "filling", *settings, fault="pace:rank=0:step=1"), small, "filling", fill)
        assert (small / "ballast").exists(), "it was full"
        assert found.status == "FAILED"
        (said,) = [line for line in found.log if line.startswith("tandem: error: ")]
        assert "a file could not be written or read: No space left on device" in said
        assert str(found.folder) in said
        assert found.run.info.status == "FAILED"
        assert "No space left" in found.run.data.tags["tandem.error"]
        (small / "ballast").unlink()
        again = run(folder, small, "filling", *settings)
        assert again.folder == found.folder
        assert again.status == "SUCCEEDED", again.log
        assert sorted(again.losses()) == list(range(1, 41))
        assert again.run.info.status == "FINISHED"
        assert again.run.data.tags["tandem.error"] == ""
    finally:
        os.system(f"umount {small}")


def test_a_job_that_ends_before_its_driver_begins_says_why(cluster):
    job = connect.job_client().submit_job(
        entrypoint="python -m jobs.driver x.yaml",
        submission_id="never-begun",
        runtime_env={"working_dir": "gcs://_ray_pkg_0123456789abcdef.zip"},
    )
    said, _ = faults.follower(job).communicate(timeout=60)
    assert "never-begun: runtime_env setup failed" in said


def test_weights_that_cannot_be_read_are_not_tried_again(folder, storage):
    parent = run(folder, storage, "parent", "training.steps=2", "resources.workers=1")
    assert parent.status == "SUCCEEDED", parent.log
    damaged = folder / "damaged-model"
    shutil.copytree(parent.folder / "model", damaged)
    # Its header and size agree, so that only a worker finds out: the shape is not that of two numbers.
    header = b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}'
    (damaged / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    spec = {**faults.SPEC, "phase": "finetune", "model": {"from": str(damaged)}}
    spec["data"] = {key: value for key, value in faults.SPEC["data"].items() if key != "tokenizer"}
    found = run(folder, storage, "unreadable", "resources.workers=1", spec=spec)
    assert found.status == "FAILED"
    (failure,) = found.failures()
    assert (failure["kind"], failure["action"]) == ("bad data", "stop")
    (said,) = [line for line in found.log if line.startswith("tandem: error: ")]
    assert f"the weights in {damaged} cannot be loaded: " in said
    assert "weights_only" not in "\n".join(found.log)
