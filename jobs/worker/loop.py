"""The training loop, as each worker of the Ray Train group runs it.

set up: task, rows, model, engine; resume from the newest valid checkpoint
evaluate
for each step:
    for each of this rank's micro-batches:   loss / targets of the GLOBAL batch → backward
    sum the loss over ranks; stop before the update if it is not finite
    wait until a checkpoint that is being saved has been copied (or written, where it is not copied)
    clip, update; stop if the gradient was not finite
    average running statistics
    write the step's metrics to the spool on disk
    now and then: evaluate; begin to save a checkpoint
evaluate, export the weights as safetensors
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

import numpy as np
import torch

from jobs import noise
from jobs.checkpoint import resume, shards
from jobs.checkpoint.catalog import Manifest
from jobs.checkpoint.fence import Superseded
from jobs.checkpoint.shards import Fragment
from jobs.run_folder import RunFolder
from jobs.tasks import Batch
from jobs.worker import by_source, flops, pace, proof, save_room, untaught
from jobs.worker.compiling import SETTLED
from jobs.worker.config import WorkerConfig
from jobs.worker.elsewhere import StoreFailed
from jobs.worker.evaluate import check_rated, to_device
from jobs.worker.export import NotWritten
from jobs.worker.finish import export_weights
from jobs.worker.learned import EVERY_STEPS
from jobs.worker.losses import RecentLosses, check_gradient
from jobs.worker.meter import Meter
from jobs.worker.prefetch import prefetch
from jobs.worker.schedules import learning_rate
from jobs.worker.setup import Worker, set_up
from jobs.worker.surroundings import arrived, logged, swap_folder, system_metrics
from tracking.spool import Spool


def train_worker(config: WorkerConfig) -> None:
    """Train on this worker: the function Ray Train runs."""
    noise.quiet()
    arrived(config)
    with system_metrics(config.folder.spool), logged(config) as watchdog, swap_folder(config) as folder:
        worker = set_up(config, watchdog, folder)
        worker.engine.model.train()
        worker.injector.inject("start", worker.start)
        meter = begin_meter(worker)
        finished = run_steps(worker, meter)
        end_meter(worker, meter)
        finish_checkpoint(worker)
        report_checkpoints(worker)
        if finished:
            worker.saver.release()
            evaluate_now(worker, worker.steps, "final")
            with watchdog.during("export", learns=False), worker.engine.eager():
                exported(worker)
    if worker.spool is not None:
        close_spool(worker.spool, worker.folder)


def exported(worker: Worker) -> None:
    """Export the model; where its store or the disk does not take it, save what was trained first. Collective.

    Raises:
        StoreFailed, NotWritten: it does not; on every rank.
    """
    try:
        export_weights(worker)
    except (StoreFailed, NotWritten):
        every = worker.spec.checkpoint.every_steps
        if worker.start < worker.steps and not (every and worker.steps % every == 0):  # else it is saved
            begin_checkpoint(worker, worker.steps)
            finish_checkpoint(worker)
            for outcome in worker.saver.outcomes():
                if outcome.error:
                    print(f"the trained state could not be saved: {outcome.error}", flush=True)
        raise


def close_spool(spool: Spool, folder: RunFolder) -> None:
    """End the metrics, and have the run say how many the disk did not take."""
    spool.close()
    if spool.lost:
        with suppress(OSError):  # the disk is still full: the worker's log has said it
            folder.add_remarks([f"{spool.lost} lines of metrics are missing: the disk did not take them"])


def begin_meter(worker: Worker) -> Meter:
    """Begin to measure this rank's steps. Collective."""
    engine = worker.engine
    (peak,) = engine.all_sum(flops.peak(engine.device, worker.precision))
    on_gpu, ranks = engine.device.type == "cuda", engine.world_size
    kept = pace.keeper(worker.folder, engine.rank, ranks, on_gpu=on_gpu, zero_stage=worker.zero_stage)
    how = (peak, engine.eager, ranks, kept)
    return Meter(engine.device, engine.rank, worker.spool, worker.folder.spool, *how)


def end_meter(worker: Worker, meter: Meter) -> None:
    """End it, and have the run say why it has no FLOPs if the model multiplies in a way that is not known."""
    meter.close()
    if worker.first and meter.uncounted:
        with suppress(OSError):
            names = ", ".join(sorted(meter.uncounted))
            worker.folder.add_remarks([f"no model_flops_per_second: not known how to count {names}"])


def run_steps(worker: Worker, meter: Meter, after: Callable[[int], None] = lambda done: None) -> bool:
    """Run the steps that are left. Return False when the driver asked to stop; a checkpoint was written then.

    Args:
        after: called after each step, with how many are done.
    """
    engine, training = worker.engine, worker.training
    if worker.start == 0:
        evaluate_now(worker, 0, "first")
    elif before := worker.folder.first_evaluation():
        worker.evaluations["first"] = before
    recent = RecentLosses(worker.spec.failures.loss_spike)
    previous, saved = time.perf_counter(), worker.start
    for step, (micro_batches, targets, data_wait_s) in prefetch(worker):
        rate = learning_rate(training, step, worker.steps)
        engine.set_learning_rate(rate)
        torch.manual_seed(step_seed(training.seed, step, engine.rank))
        with settling(worker, step):
            loss, stop, save, done_flops = forward_backward(worker, meter, micro_batches, targets)
        loss *= {"nan": math.nan, "spike": 1e3}.get(worker.injector.inject("step", step + 1) or "", 1.0)
        recent.check(loss, step + 1)
        wait_copied(worker)
        with meter.during("optimizer"):
            engine.step()
        norm = engine.gradient_norm()
        check_gradient(norm, loss, step + 1)  # before the step is noted or saved: its weights are of no use
        with meter.during("buffers"):
            engine.average_buffers()
        worker.updates += 1
        done, now = step + 1, time.perf_counter()
        metrics = {"loss": loss, "learning_rate": rate, "gradient_norm": norm, "workers": float(engine.world_size)}
        rates = {f"{worker.task.unit}_per_second": targets / (now - previous), **compiled(worker, done)}
        metrics |= count_sources(worker, done)
        meter.end_step(
            done, {**metrics, **rates, "step_time_s": now - previous, "data_wait_s": data_wait_s}, done_flops
        )
        worker.watchdog.step(now - previous)
        previous = now
        if training.eval_every and done % training.eval_every == 0 and done < worker.steps:
            evaluate_now(worker, done, "latest")
            previous = time.perf_counter()
        every = worker.spec.checkpoint.every_steps
        if stop or save or (every and done % every == 0):
            begin_checkpoint(worker, done)
            if worker.first:
                worker.folder.save_granted()
            saved = done
        report_checkpoints(worker)
        after(done)
        if stop and done < worker.steps:
            return False
    return not end_short(worker, saved)


def end_short(worker: Worker, saved: int) -> bool:
    """Save, and return True, where a step's rows do not come; `saved`: the step of the last checkpoint. Collective."""
    if worker.short is None:
        return False
    if worker.short > saved:
        begin_checkpoint(worker, worker.short)
        report_checkpoints(worker)
    return True


def forward_backward(
    worker: Worker, meter: Meter, micro_batches: list[Batch | None], targets: int
) -> tuple[float, bool, bool, float]:
    """Accumulate one global batch's gradients; return its mean loss, whether to stop, whether to save, and its FLOPs.

    The last micro-batch is left to `engine.step()` by the caller, after the loss has been looked at.

    Args:
        micro_batches: this rank's, each with tensors [b, …] as the task's `collate` makes them; None has no rows.
        targets: terms of the loss in the global batch, over all ranks.
    """
    engine, task = worker.engine, worker.task
    total = torch.zeros((), device=engine.device)
    filler = next(batch for batch in reversed(micro_batches) if batch is not None) if any(micro_batches) else None
    for index, micro_batch in enumerate(micro_batches):
        # A rank without rows left still takes part in the collectives of the backward pass, with weight 0.
        batch = micro_batch or filler or worker.part(task.collate(worker.rows.take(np.zeros(1, dtype=np.int64))))
        with meter.forward(micro_batch):
            loss, _ = task.loss(engine.model, to_device(batch, engine.device))
        if worker.first and worker.updates == index == 0 and micro_batch is not None:
            worker.folder.add_remarks(untaught.remarks(loss, engine.model.module))
        weighted = loss if micro_batch is not None else loss * 0.0
        with meter.backward():
            engine.backward(weighted / max(targets, 1))
        total += weighted.detach()
        if index + 1 < len(micro_batches):
            engine.step()
    asked = (worker.folder.stop_requested(), worker.folder.save_requested()) if worker.first else (False, False)
    with meter.during("loss_sum"):
        loss_sum, stop, save, flops_sum = engine.all_sum(total, *map(float, asked), meter.rank_flops())
    return loss_sum / max(targets, 1), stop > 0, save > 0, flops_sum


def settling(worker: Worker, step: int) -> AbstractContextManager[None]:
    """Return what a step's passes run in: one of the first that a compiler may work in may take long, on all ranks."""
    if worker.compiling is None or step >= worker.start + SETTLED:
        return nullcontext()
    return worker.watchdog.during("settling", learns=False)


def compiled(worker: Worker, done: int) -> dict[str, float]:
    """Return what a compiler took within the step that ends, if it did; have the run told once the first are over."""
    if worker.compiling is None:
        return {}
    if worker.first and done == min(worker.start + SETTLED, worker.steps):
        with suppress(OSError):
            worker.folder.add_remarks([worker.compiling.said()])
    return worker.compiling.take()


def count_sources(worker: Worker, done: int) -> dict[str, float]:
    """Count what a step has learned from the sources of a mixture; return their shares of the run, now and then."""
    if worker.learned is None:
        return {}
    worker.learned.end_step(done - 1)
    if worker.first and done == worker.steps:
        with suppress(OSError):
            worker.folder.add_remarks([worker.learned.said()])
    return worker.learned.metrics() if done % EVERY_STEPS == 0 or done == worker.steps else {}


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return what seeds the dropout of a step on a rank, so that a resumed run draws what an unbroken one would."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def evaluate_now(worker: Worker, step: int, label: str) -> None:
    """Measure the held-out rows and spool the result as `eval_…`. Collective."""
    if worker.until is not None or not len(worker.eval_rows):
        return
    with worker.watchdog.during("evaluation"), worker.engine.eager():
        worker.injector.inject("evaluate", step)
        sums = proof.measure_live(worker, worker.eval_rows, worker.spec.data.eval_max_rows, worker.held_out)
    metrics = by_source.summarised(worker.task, sums)
    check_rated(metrics, worker.spec.checkpoint.metric, worker.spec.checkpoint.keep_best)
    worker.evaluations[label] = metrics
    if worker.first and label == "first":
        with suppress(OSError):  # a full disk costs the number, not the run its worker
            worker.folder.write_first_evaluation(metrics)
    if worker.first and label == "final":
        worker.folder.write_sums(by_source.of_all(sums))
    elif worker.first and not math.isfinite(metrics["loss"]):
        worker.folder.add_remarks([f"the loss on the held-out rows is {metrics['loss']} at step {step}"])
    if worker.spool is not None:
        worker.spool.append(step, {f"eval_{key}": value for key, value in metrics.items()})


def wait_copied(worker: Worker) -> None:
    """Wait until what is being saved may change. Collective where anything was.

    That is once it has been copied, so that nobody's step pays for the disk; or written, where there is no memory or
    the state lies in files.
    """
    if worker.saver.to_copy:
        direct = worker.saver.direct
        with worker.watchdog.during("save" if direct else "copy", learns=not direct):
            worker.saver.wait_copied()
            worker.engine.all_sum(0.0)


def finish_checkpoint(worker: Worker) -> None:
    """Wait for the checkpoint that is being saved, as long as the storage takes. Collective.

    Rank 0 waits for all shards and writes the manifest; without the sum at the end, the others would wait for it
    within their next step, and be taken to hang.
    """
    with worker.watchdog.during("save", learns=False):
        worker.saver.finish()
        worker.engine.all_sum(0.0)


def begin_checkpoint(worker: Worker, step: int) -> None:
    """Begin to save the state after `step`, once the one before is saved. Collective."""
    if worker.until is not None:
        return
    finish_checkpoint(worker)
    engine = worker.engine
    evaluation = worker.evaluations.get("latest", {})
    manifest = Manifest(
        step,
        worker.updates,
        engine.world_size,
        worker.zero_stage,
        metrics=evaluation,
        elements=engine.elements(),
        data=worker.data,
        order=worker.order,
        learned=worker.learned.noted() if worker.learned else {},
    )
    extra = resume.buffers(engine.model.module) if worker.first else None
    fragments = engine.owned_fragments()
    worker.saver.begin(manifest, fragments, extra, direct=engine.in_files or no_room(worker, fragments))
    worker.injector.inject("saved", step)


def no_room(worker: Worker, fragments: Sequence[Fragment]) -> bool:
    """Return whether a rank's machine has no memory for copies of `fragments`, and say so. Collective."""
    copy = shards.total_elements(fragments) * shards.FLOAT_BYTES
    lacking = save_room.shortage(resume.gathered(save_room.look(copy, worker.saver.held)))
    if lacking and worker.first:
        with suppress(OSError):
            worker.folder.add_remarks([lacking.said()])
    return lacking is not None


def report_checkpoints(worker: Worker) -> None:
    """Spool how the saves went that have ended, and note it for the driver.

    Raises:
        Superseded: a newer attempt works on the run.
    """
    for outcome in worker.saver.outcomes():
        if outcome.error:
            print(f"the checkpoint of step {outcome.step} could not be saved: {outcome.error}", flush=True)
        if outcome.superseded:
            raise Superseded(outcome.error)
        if worker.spool is None:
            continue
        with suppress(OSError):  # a full disk costs the driver the count, not the run its worker
            worker.folder.note_save(outcome.error)
            if outcome.error:
                worker.folder.add_remarks([f"the checkpoint of step {outcome.step} was not saved: {outcome.error}"])
        if outcome.error:
            worker.spool.append(outcome.step, {"checkpoint_failed": 1.0})
        else:
            taken = {"checkpoint_s": outcome.total_s, "checkpoint_stall_s": outcome.stalled_s}
            worker.spool.append(outcome.step, {**taken, "checkpoint_bytes": float(outcome.size)})
