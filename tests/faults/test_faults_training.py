"""Training through faults: every test compares with the run that nothing happened to, at ZeRO stage 3.

Workers are killed at every stage: at 3 here unless a test says otherwise, at 0 while they save, at 1 and 2 where they
freeze or sleep, and with their nodes (test_faults_cluster.py).
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from cluster.errors import UserError
from tests.support import fault_runs as faults
from tests.support import members
from tests.support.fault_runs import ended, run, same_curve, submitted
from tracking import registry

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def unfaulted(folder, storage):
    found = run(folder, storage, "unfaulted")
    assert found.status == "SUCCEEDED", found.log
    losses = found.losses()
    assert sorted(losses) == list(range(1, 41))
    return losses


def test_a_worker_killed_at_any_step(unfaulted, folder, storage):
    """Step and rank are drawn; the name of the injected fault says which."""
    step, rank = random.randint(11, 39), random.randint(0, 1)
    fault = f"kill:rank={rank}:step={step};rows:rank=0:step=1;rows:rank=1:step=1"
    found = run(folder, storage, "killed", fault=fault)
    assert found.status == "SUCCEEDED", found.log
    assert found.injected() == {f"kill-rank{rank}-step{step}-step"}
    same_curve(found.losses(), unfaulted)
    assert found.run.info.status == "FINISHED"
    (failure,) = found.failures()
    assert (failure["kind"], failure["action"], failure["rank"]) == ("worker killed", "retry", rank)
    assert failure["checkpoint"] in (10 * ((step - 1) // 10), 10 * ((step - 1) // 10) - 10), (
        "or the one before, unsaved"
    )
    assert failure["step"] in (step - 2, step - 1)
    page = found.page()
    assert f"worker killed, rank {rank}, after step" in page
    assert "last lines of" in page
    rows = found.rows()
    assert sorted(rows) == list(range(1, 41))
    assert all(len(taken) == 6 for taken in rows.values()), "none lost"
    assert len({row for taken in rows.values() for row in taken}) == 40 * 6, "none twice: an epoch is longer"


@pytest.mark.alone  # the limit that is asserted leaves a second
def test_a_worker_that_sleeps_for_ever(unfaulted, folder, storage):
    found = run(folder, storage, "asleep", "training.deepspeed.zero_stage=2", fault="sleep:rank=1:step=27")
    assert found.status == "SUCCEEDED", found.log
    assert found.injected() == {"sleep-rank1-step27-step"}
    same_curve(found.losses(), unfaulted)
    (failure,) = found.failures()
    assert failure["kind"] == "hang"
    page = found.page()
    assert page.count("Python stacks of") == 2, "the stacks of both ranks"
    assert "time.sleep" in page or "_sleep" in page
    took_s = failure["time"] - _time_of_step(found, 26)
    assert took_s < 3 * 0.5 + 10, f"found after {took_s:.1f} s"


def test_a_frozen_worker(unfaulted, folder, storage):
    found = run(folder, storage, "frozen", "training.deepspeed.zero_stage=1", fault="freeze:rank=1:step=27")
    assert found.status == "SUCCEEDED", found.log
    same_curve(found.losses(), unfaulted)
    assert [failure["kind"] for failure in found.failures()] == ["hang"]
    assert members.stopped() == [], "the frozen one is gone"


def test_a_worker_killed_while_it_saves(unfaulted, folder, storage):
    """Without ZeRO, where each rank has all of the state and saves a share of it."""
    found = run(folder, storage, "torn", "training.deepspeed.zero_stage=0", fault="kill:rank=1:step=20:phase=save")
    assert found.status == "SUCCEEDED", found.log
    assert found.injected() == {"kill-rank1-step20-save"}
    same_curve(found.losses(), unfaulted)
    assert found.failures()[0]["checkpoint"] == 10, "the half one does not count"


def test_a_non_finite_loss_stops_the_run(folder, storage):
    found = run(folder, storage, "not-finite", fault="nan:rank=0:step=15;nan:rank=1:step=15")
    assert found.status == "FAILED"
    assert found.run.info.status == "FAILED"
    assert sorted(found.losses()) == list(range(1, 15)), "the step was not applied"
    (failure,) = found.failures()
    assert (failure["kind"], failure["action"], failure["step"]) == ("non-finite loss", "stop", 14)
    assert "the loss of step 15 is nan" in found.page()


def test_a_bad_batch_is_left_out_where_the_spec_says_so(unfaulted, folder, storage):
    fault = "nan:rank=0:step=15;nan:rank=1:step=15;spike:rank=0:step=32;spike:rank=1:step=32"
    settings = ["failures.non_finite=skip", "failures.loss_spike=10"]
    found = run(folder, storage, "left-out", *settings, fault=fault)
    assert found.status == "SUCCEEDED", found.log
    losses = found.losses()
    assert sorted(losses) == [step for step in range(1, 41) if step not in (15, 32)]
    same_curve({k: v for k, v in losses.items() if k < 15}, {k: v for k, v in unfaulted.items() if k < 15})
    assert [f["kind"] for f in found.failures()] == ["non-finite loss", "loss spike"]
    assert [f["action"] for f in found.failures()] == ["skip batch", "skip batch"]


def test_an_error_that_comes_back_every_time(folder, storage):
    found = run(folder, storage, "stubborn", "max_failures=2", fault="raise-always:rank=0:step=15")
    assert found.status == "FAILED"
    assert found.run.info.status == "FAILED"
    assert [failure["kind"] for failure in found.failures()] == ["user code"] * 3
    assert found.failures()[-1]["reason"] == "failed 3 times at step 15; max_failures is 2"
    assert (found.folder / "checkpoints" / "step-00000010" / "MANIFEST.json").is_file()


def test_too_little_memory_halves_the_micro_batch(unfaulted, folder, storage):
    found = run(folder, storage, "memory", fault="memory:rank=0:step=15")
    assert found.status == "SUCCEEDED", found.log
    same_curve(found.losses(), unfaulted)
    (failure,) = found.failures()
    assert (failure["kind"], failure["action"]) == ("out of memory", "halve micro-batch")
    assert failure["reason"].startswith("3 → 1 rows")


def test_stopped_and_submitted_again_with_other_workers_and_stages(unfaulted, folder, storage):
    """2 workers with ZeRO-3 → 1 without ZeRO → 3 with ZeRO-1, each from the checkpoint that the one before wrote."""
    first = run(folder, storage, "moved", fault="stop:rank=0:step=13")
    assert first.status != "SUCCEEDED"
    assert first.run.info.status == "KILLED"
    fault, settings = "stop:rank=0:step=26", ["resources.workers=1", "training.deepspeed.zero_stage=0"]
    second = run(folder, storage, "moved", *settings, fault=fault)
    assert second.status != "SUCCEEDED"
    third = run(folder, storage, "moved", "resources.workers=3", "training.deepspeed.zero_stage=1")
    assert third.status == "SUCCEEDED", third.log
    same_curve(third.losses(), unfaulted)
    assert third.folder == first.folder, "one run over all three"
    assert third.run.info.status == "FINISHED"


def test_a_killed_driver_leaves_no_run_behind_that_never_ends(unfaulted, folder, storage):
    """The guard ends the MLflow run; another submission finishes the training."""
    job = submitted(folder, "orphaned", "training.steps=400", "checkpoint.every_steps=5")
    _wait_for_checkpoint(storage, "orphaned")
    assert len(faults.workers()) == 2
    faults.driver_of("orphaned").send_signal(signal.SIGKILL)
    found = ended(job, storage, "orphaned")
    assert found.status == "FAILED"
    deadline = time.monotonic() + 60
    while found.run.info.status == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.5)
    assert found.run.info.status == "FAILED"
    assert "died without a word" in found.page()
    faults.no_workers_left()
    settings = ["training.steps=400", "checkpoint.every_steps=5"]
    again = run(folder, storage, "orphaned", *settings, fault="stop:rank=0:step=60")
    assert again.folder == found.folder
    same_curve({k: v for k, v in again.losses().items() if k <= 5}, {k: v for k, v in unfaulted.items() if k <= 5}, 1)


def test_damaged_checkpoints_are_passed_over(unfaulted, folder, storage):
    first = run(folder, storage, "damaged", "checkpoint.keep=3", fault="stop:rank=0:step=23")
    _, older, newest = sorted((first.folder / "checkpoints").glob("step-*"))
    shard = sorted(newest.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 1)
    shard = sorted(older.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    ours = [path for path in (first.folder / "ray").rglob("*") if path.is_file()]
    for path in ours:  # what Ray Train keeps for itself matters to nobody
        path.write_bytes(b"{")
    second = run(folder, storage, "damaged")
    assert second.status == "SUCCEEDED", second.log
    said = "\n".join(second.log)
    assert f"skipped checkpoint {newest.name}: " in said
    assert "bytes instead of" in said
    assert f"skipped checkpoint {older.name}: " in said
    assert "digest differs" in said
    same_curve(second.losses(), unfaulted)


def test_a_full_disk_during_a_save(unfaulted, folder, storage):
    """The file system is a small tmpfs; root may mount it."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    small = Path(os.path.realpath(folder)) / "small"
    small.mkdir()
    assert os.system(f"mount -t tmpfs -o size=4m tmpfs {small}") == 0
    try:
        (small / "ballast").write_bytes(bytes(3 << 20))  # a checkpoint has 1.4 MB; two fit without it
        job = submitted(folder, "full", f"checkpoint.directory={small}", "checkpoint.keep=1")

        def make_room(line: str) -> None:
            if "could not be saved" in line:
                (small / "ballast").unlink(missing_ok=True)

        found = ended(job, storage, "full", make_room)
        assert found.status == "SUCCEEDED", found.log
        same_curve(found.losses(), unfaulted)
        failed = faults.mlflow_client().get_metric_history(found.run.info.run_id, "checkpoint_failed")
        assert failed, "the failure is in MLflow"
        assert list(small.glob("full-*/step-*/MANIFEST.json")), "a later save worked"
    finally:
        os.system(f"umount {small}")


def _time_of_step(found, step: int) -> float:
    points = faults.mlflow_client().get_metric_history(found.run.info.run_id, "loss")
    return next(point.timestamp for point in points if point.step == step) / 1000


def _wait_for_checkpoint(storage: Path, name: str) -> None:
    deadline = time.monotonic() + 90
    while not list((storage / "runs").glob(f"{name}-*/checkpoints/step-*/MANIFEST.json")):
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.1)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_model_that_is_another_one_on_the_disk_is_not_registered(folder, storage, stage):
    """What the ranks read back has another digest. Of a model that is written whole, the loss of its files shows it."""
    name = f"twisted-{stage}"
    settings = ("resources.workers=1", "training.steps=8", f"register.model={name}")
    settings += (f"training.deepspeed.zero_stage={stage}",)
    found = run(folder, storage, name, *settings, fault="damage:rank=0:step=8:phase=exported")
    assert list((found.folder / "faults").iterdir()), "it was damaged"
    assert found.status == "FAILED"
    assert any("does not read back as it was written" in line for line in found.log), found.log[-5:]
    assert not (found.folder / "model").exists()
    assert found.run.info.status == "FAILED"
    with pytest.raises(UserError, match=f"no registered model '{name}'"):
        registry.find_version(f"models:/{name}/1")
    again = run(folder, storage, name, *settings)
    assert again.status == "SUCCEEDED", "from its last checkpoint"
