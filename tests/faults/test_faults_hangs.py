"""A worker hangs at any kind of moment: it is found within the limit of that moment, and the run goes on unchanged."""

import os
import signal
import time

import psutil
import pytest

from cluster import connect
from jobs import submit
from jobs.run_folder import RunFolder
from tests.support import fault_runs as faults
from tests.support import members
from tests.support.fault_runs import ended, run, same_curve, submitted

pytestmark = pytest.mark.usefixtures("cluster")
EVALUATED = ["training.eval_every=10", "data.eval_fraction=0.1"]


@pytest.fixture(scope="module")
def unfaulted(folder, storage):
    found = run(folder, storage, "steady", *EVALUATED)
    assert found.status == "SUCCEEDED", found.log
    return found.losses()


def hung(found, unfaulted, *markers: str) -> list[dict]:
    """Assert that the faults happened, that each was a hang, and that nothing else differs; return the failures."""
    assert found.status == "SUCCEEDED", found.log
    assert found.injected() == set(markers)
    same_curve(found.losses(), unfaulted)
    assert [failure["kind"] for failure in found.failures()] == ["hang"] * len(found.failures())
    assert found.run.info.status == "FINISHED"
    return found.failures()


def test_after_a_checkpoint_and_in_an_evaluation(unfaulted, folder, storage):
    """Rank 1 sleeps behind a save, where only another step would have armed its watchdog; then all in an evaluation."""
    fault = "sleep:rank=1:step=10:phase=saved;sleep:rank=0:step=30:phase=evaluate;sleep:rank=1:step=30:phase=evaluate"
    found = run(folder, storage, "behind-a-save", *EVALUATED, fault=fault)
    markers = ["sleep-rank1-step10-saved", "sleep-rank0-step30-evaluate", "sleep-rank1-step30-evaluate"]
    saved, evaluated = hung(found, unfaulted, *markers)
    assert (saved["step"], evaluated["step"]) == (10, 30)
    for failure in (saved, evaluated):
        took_s = failure["time"] - faults.time_of_step(found, failure["step"])
        assert took_s < 25, f"found after {took_s:.1f} s"
        assert sum("Python stacks of" in line for line in failure["evidence"]) == 2, "of both ranks"


def test_a_rank_that_never_gives_the_lock_of_python_back(unfaulted, folder, storage):
    """No thread of Python runs any more: C writes the stacks, and the kernel ends the process."""
    found = run(folder, storage, "locked", *EVALUATED, fault="hold:rank=1:step=21")
    (failure,) = hung(found, unfaulted, "hold-rank1-step21-step")
    took_s = failure["time"] - faults.time_of_step(found, failure["step"])
    assert took_s < 25, f"found after {took_s:.1f} s"
    assert any("_hold" in line for line in failure["evidence"])


def test_at_the_start_and_while_exporting(unfaulted, folder, storage):
    """What has not been measured has `failures.hang_after_s`."""
    fault = "sleep:rank=1:step=0:phase=start;sleep:rank=0:step=40:phase=export;sleep:rank=1:step=40:phase=export"
    found = run(folder, storage, "at-the-ends", "failures.hang_after_s=20", *EVALUATED, fault=fault)
    markers = ["sleep-rank1-step0-start", "sleep-rank0-step40-export", "sleep-rank1-step40-export"]
    start, export = hung(found, unfaulted, *markers)
    assert (start["step"], export["step"]) == (0, 40)


def test_a_rank_that_nothing_within_its_process_can_end(unfaulted, folder, storage):
    """Stopped by a signal, and no other rank waits for it: the driver misses its sign of life."""
    found = run(folder, storage, "no-pulse", "resources.workers=1", *EVALUATED, fault="freeze:rank=0:step=27")
    (failure,) = hung(found, unfaulted, "freeze-rank0-step27-step")
    took_s = failure["time"] - faults.time_of_step(found, 26)
    assert took_s < 40, f"found after {took_s:.1f} s"
    assert any("no sign of life (its process is stopped)" in line for line in failure["evidence"])
    assert members.stopped() == [], "it is gone"


def test_stopped_while_the_data_is_prepared(folder, storage):
    """There is nothing to save yet, so nothing is waited for."""
    job = submitted(folder, "unprepared", "data.max_examples=6011", "data.tokenizer.vocab_size=4096")
    asked = []

    def stop(line: str) -> None:
        if "tandem: fit " in line and not asked:
            asked.append(time.monotonic())
            submit.stop(job)

    found = ended(job, storage, "unprepared", stop)
    assert asked, "it was stopped meanwhile"
    assert time.monotonic() - asked[0] < 20
    assert found.status == "STOPPED"
    assert found.run.info.status == "KILLED"
    assert not (found.folder / "attempt.json").exists(), "no worker has begun"
    assert not list((storage / "data").glob("*.partial"))


def test_a_hung_job_that_is_stopped_has_ended_everywhere(folder, storage):
    """Ray asks its driver and all below it to end, then kills them; the guard ends the run."""
    fault = "sleep:rank=1:step=0:phase=evaluate"
    job = faults.submitted_plainly(folder, "hung-stopped", *EVALUATED, fault=fault, patience_s=3)
    path = faults.wait_for_folder(storage, "hung-stopped")
    faults.wait_for(lambda: list(path.glob("faults/*")), "hang")
    tree = [*faults.tree_of(faults.driver_of("hung-stopped")), *faults.tree_of(faults.owner_of(path))]
    assert len(faults.workers()) == 2
    assert connect.job_client().stop_job(job)
    found = ended(job, storage, "hung-stopped")
    assert found.status == "STOPPED"
    assert psutil.wait_procs(tree, timeout=15)[1] == [], "Ray has killed them"
    faults.wait_for(lambda: found.run.info.status == "KILLED", "end in MLflow", 30)
    assert '"KILLED"' in (path / "status.json").read_text()
    assert "was asked to stop and did not" in found.page()
    faults.no_workers_left()


def test_ctrl_c(folder, storage):
    """At the terminal that follows a job it only detaches; at the driver the job saves, and ends as stopped."""
    settings = ["training.steps=400", "checkpoint.every_steps=100000"]
    job = submitted(folder, "ctrl-c", *settings, fault="pace:rank=0:step=1")
    path = faults.wait_for_folder(storage, "ctrl-c")
    follower = faults.follower(job)
    faults.wait_for(lambda: faults.steps_of(path) > 10, "training")
    follower.send_signal(signal.SIGINT)
    output, _ = follower.communicate(timeout=30)
    assert follower.returncode == 130
    assert f"tandem jobs stop {job}" in output
    before = faults.steps_of(path)
    faults.wait_for(lambda: faults.steps_of(path) > before + 5, "the job goes on")
    assert len(faults.workers()) == 2
    os.kill(faults.driver_of("ctrl-c").pid, signal.SIGINT)
    found = ended(job, storage, "ctrl-c")
    assert found.status == "FAILED"
    assert any("asked to stop" in line for line in found.log)
    assert any("submit the same spec again to go on" in line for line in found.log)
    assert found.run.info.status == "KILLED"
    assert '"KILLED"' in (path / "status.json").read_text()
    last = max(found.losses())
    assert (path / "checkpoints" / f"step-{last:08d}" / "MANIFEST.json").is_file(), "saved where it stopped"
    faults.no_workers_left()


def test_a_worker_killed_for_memory(folder, storage):
    """The kernel kills it, in a group of processes whose memory is limited; no row is lost by it."""
    if not os.access("/sys/fs/cgroup/memory", os.W_OK):
        pytest.skip("a group of limited memory needs root and cgroup v1")
    group = f"/sys/fs/cgroup/memory/tandem-test-{os.getpid()}"
    fault = "pace:rank=0:step=1;hog:rank=1:step=25;rows:rank=0:step=1;rows:rank=1:step=1"
    job = submitted(folder, "hungry", "failures.out_of_memory=halve", fault=fault)
    path = faults.wait_for_folder(storage, "hungry")
    faults.wait_for(lambda: faults.steps_of(path) > 2, "training")
    os.mkdir(group)
    try:
        faults.write(f"{group}/memory.limit_in_bytes", 300 << 20)
        faults.write(f"{group}/cgroup.procs", RunFolder(path).attempt().pids[1])
        found = ended(job, storage, "hungry")
        with open(f"{group}/memory.oom_control") as file:
            assert "oom_kill 1" in file.read(), "the kernel killed it"
    finally:
        faults.wait_for(lambda: faults.removed(group), "end of the group")
    assert found.status == "SUCCEEDED", found.log
    assert "hog-rank1-step25-step" in found.injected()
    (failure,) = found.failures()
    assert (failure["kind"], failure["rank"], failure["action"]) == ("out of memory", 1, "halve micro-batch")
    rows = found.rows()
    assert sorted(rows) == list(range(1, 41))
    assert all(len(taken) == 6 for taken in rows.values()), "none lost"
    assert len({row for taken in rows.values() for row in taken}) == 40 * 6, "none twice"
