"""The worker group of a training job: Ray Train's trainer with our policies (its insides: ray_train_internals.py)."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import ray.train

from cluster import placement, stores, topology
from cluster.errors import UserError
from jobs import deaths
from jobs.checkpoint import catalog
from jobs.checkpoint.store import Store
from jobs.data.batches import whole_groups
from jobs.driver import failures, postmortem, warm
from jobs.driver.failures import Decision, Failure, Limits, RankError
from jobs.driver.leaving import Leaves, Leaving
from jobs.driver.ray_train_internals import (
    ControllerCallback,
    ElasticPolicy,
    FailureDecision,
    FailurePolicy,
    FixedScalingPolicy,
    FixedWithoutAutoscaler,
    InterfacesFirst,
    NoopDecision,
    PolicyTrainer,
    ResizeDecision,
    worker_resources,
)
from jobs.run_folder import RunFolder
from jobs.run_notes import Attempt
from jobs.spec import WorkersSpec
from jobs.worker.config import WorkerConfig

NODE_DEATH_S = 20.0
"""Within it, Ray declares a node dead that does not answer."""
START_UPS = 10
"""How often workers may fail to start in a row; Ray Train itself would try for ever."""


class ElasticSize(ElasticPolicy):
    """Ray Train's elastic size; before a running group is resized, it saves, so that no step is done twice."""

    SAVE_TIMEOUT_S = 120.0

    def __init__(self, scaling_config: Any, run: RunFolder, store: Store, multiple: int = 1) -> None:
        """`multiple`: workers that share rows; a group is made of whole ones."""
        super().__init__(scaling_config)
        self._run, self._store, self._multiple = run, store, multiple
        self._asked_at: float | None = None
        self._newest = 0

    def make_decision_for_non_running_worker_group(self, *arguments: Any, **keywords: Any) -> Any:
        """Return Ray Train's decision, for no more workers than fit on the nodes that are not excluded."""
        decision = super().make_decision_for_non_running_worker_group(*arguments, **keywords)
        return self._capped(decision)

    def _capped(self, decision: Any) -> Any:
        if not isinstance(decision, ResizeDecision):
            return decision
        excluded, most = self._run.control().excluded, decision.num_workers
        if excluded:
            most = min(most, self._room(excluded))
        return replace(decision, num_workers=whole_groups(most, self._multiple))

    def _room(self, excluded: Sequence[str]) -> int:
        wanted = worker_resources(self.scaling_config)
        nodes = [node for node in topology.nodes() if node.node_id not in excluded]
        return placement.capacity(placement.Request(1, wanted.get("CPU", 0), wanted.get("GPU", 0)), nodes)

    def make_decision_for_running_worker_group(self, *arguments: Any, **keywords: Any) -> Any:
        """Return Ray Train's decision, or none yet: as long as the checkpoint that it needs is not there."""
        if self._asked_at is not None:
            waited = time.monotonic() - self._asked_at
            if max(catalog.complete(self._store), default=0) <= self._newest and waited < self.SAVE_TIMEOUT_S:
                return NoopDecision()
            self._asked_at = None
            self.decide_anew()
            return self._capped(super().make_decision_for_running_worker_group(*arguments, **keywords))
        decision = self._capped(super().make_decision_for_running_worker_group(*arguments, **keywords))
        attempt = self._run.attempt()
        if isinstance(decision, ResizeDecision) and attempt and decision.num_workers == attempt.workers:
            return NoopDecision()  # what would grow it is an excluded node
        if isinstance(decision, ResizeDecision):
            self._newest = max(catalog.complete(self._store), default=0)
            self._asked_at = time.monotonic()
            self._run.request_save()
            return NoopDecision()
        return decision


class ElasticGroup(Leaves, ElasticSize):
    """A group of as many workers as there is room for."""


class FixedSize(Leaves, FixedWithoutAutoscaler):
    """A group of one size, on a cluster that cannot grow."""


class FixedSizeOfMore(Leaves, FixedScalingPolicy):
    """A group of one size, on a cluster that may get more nodes for it."""


class Failures(FailurePolicy):
    """Ray Train's question what to do about a failure, answered by jobs/driver/failures.py, and written down."""

    def __init__(
        self, failure_config: Any, run: RunFolder, store: Store, limits: Limits, request: placement.Request
    ) -> None:
        """`request`: the smallest group that can go on."""
        super().__init__(failure_config)
        self._run, self._store, self._limits, self._request = run, store, limits, request
        self._start_ups = 0
        self._earlier: list[Failure] = []
        self._told = set(run.hung_attempts())
        """Attempts that have failed already."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Classify, decide, note it for the post-mortem and for the next attempt; then retry or raise."""
        try:
            return self._decided(training_failed_error)
        except Exception:  # whatever it is, Ray Train would start the group and ask again, for ever
            traceback.print_exc()
            return FailureDecision.RAISE

    def _decided(self, training_failed_error: Any) -> FailureDecision:
        attempt = self._run.attempt()
        errors = {rank: RankError.of(e) for rank, e in getattr(training_failed_error, "worker_failures", {}).items()}
        if not errors:  # the controller's own: workers that could not be started, for instance on a node just lost
            self._start_ups += 1
            return FailureDecision.RAISE if self._start_ups > START_UPS else FailureDecision.RETRY
        self._start_ups = 0
        hung = self._hung(attempt)
        failure = self._happened(errors, attempt, hung=hung is not None)
        decision = self._decision(failure, attempt)
        self._earlier.append(failure)
        self._note(decision, failure, attempt)
        self._keep(failure, decision, attempt, hung or (attempt.name if attempt else None))
        time.sleep(decision.wait_s)
        return FailureDecision.RAISE if decision.action == "stop" else FailureDecision.RETRY

    def _happened(self, errors: dict[int, RankError], attempt: Attempt | None, *, hung: bool) -> Failure:
        started = attempt is not None and attempt.training
        lost = self._lost_ranks(attempt) if attempt else []
        if attempt and not lost and not hung and failures.need_deaths(errors):
            errors = failures.with_deaths(errors, deaths.of(attempt))
        failure = failures.classify(errors, self._run.last_step(), hung=hung, started=started, lost=lost)
        return replace(failure, node=_node_of(failure, attempt))

    def _decision(self, failure: Failure, attempt: Attempt | None) -> Decision:
        if self._run.stop_requested():
            return Decision("stop", "the job was asked to stop; it is not started again for that")
        micro_batch = attempt.micro_batch if attempt else 1
        room = self._has_room_without(failure.node) if failure.node else False
        return failures.decide(failure, self._earlier, self._limits, micro_batch=micro_batch, room=room)

    def _keep(self, failure: Failure, decision: Decision, attempt: Attempt | None, name: str | None) -> None:
        """Write the failure down for the post-mortem; a disk that does not take it costs the page an entry."""
        entry = {
            **failure.as_dict(),
            "time": time.time(),
            "action": decision.action,
            "reason": decision.reason,
            "checkpoint": max(catalog.complete(self._store), default=0),
            "workers": attempt.workers if attempt else None,
            **(_place(failure.node) if failure.node else {}),
            "evidence": postmortem.evidence(self._run, name) if name else [],
        }
        try:
            self._run.add_failure(entry)
        except OSError as error:
            print(f"{failure.kind} → {decision.action}: {decision.reason} (not written down: {error})", flush=True)

    def _hung(self, attempt: Attempt | None) -> str | None:
        """Return the attempt that has just hung, if one has; it may not have got as far as to note itself."""
        found = [name for name in self._run.hung_attempts() if name not in self._told]
        self._told |= {*found, *([attempt.name] if attempt else [])}
        return found[0] if found else None

    def _lost_ranks(self, attempt: Attempt) -> list[int]:
        """Find the ranks whose nodes are gone, and wait until Ray knows it too: it would place workers there again."""
        silent = topology.silent(attempt.nodes)
        deadline = time.monotonic() + NODE_DEATH_S
        while silent & topology.alive() and time.monotonic() < deadline:
            time.sleep(0.25)
        return [rank for rank, node in enumerate(attempt.nodes) if node in silent]

    def _has_room_without(self, node: str) -> bool:
        excluded = {node, *self._run.control().excluded}
        answer = placement.fit(self._request, [n for n in topology.nodes() if n.node_id not in excluded])
        return isinstance(answer, placement.Placement) or answer.fits_when_free

    def _note(self, decision: Decision, failure: Failure, attempt: Attempt | None) -> None:
        control = self._run.control()
        if decision.action == "skip batch":
            bad = failure.step  # the step after the last applied one, less those that were left out already
            while bad in control.skip:
                bad += 1
            control = replace(control, skip=(*control.skip, bad))
        elif decision.action == "halve micro-batch" and attempt:
            control = replace(control, micro_batch=attempt.micro_batch // 2)
        elif decision.action == "exclude node" and failure.node:
            control = replace(control, excluded=(*control.excluded, failure.node))
        else:
            return
        self._run.write_control(control)


class Exclude(ControllerCallback):
    """Keeps workers off the nodes that a failure has excluded."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
        """Return the label selector of the workers' placement group."""
        excluded = self._run.control().excluded
        return {"ray.io/node-id": f"!in({','.join(excluded)})"} if excluded else None


def _place(node_id: str) -> dict[str, str]:
    """Return where a node is, and why Ray has taken it off if it has, for the post-mortem; nothing if Ray is silent."""
    with suppress(UserError):
        node = next((node for node in topology.nodes() if node.node_id == node_id), None)
        if node is not None:
            return {"where": f"{node.address} ({node_id[:8]})", "node_said": " ".join(node.reason.split())}
    return {}


def _newest(store: Store) -> int:
    return max(catalog.complete(store), default=0)


def _node_of(failure: Failure, attempt: Attempt | None) -> str | None:
    known = attempt is not None and failure.rank is not None and failure.rank < len(attempt.nodes)
    return attempt.nodes[failure.rank] if known else None  # type: ignore[union-attr, index]


def _kept_in(place: str) -> dict[str, Any]:
    """Return where Ray Train keeps its own state, a path or a URI, as it takes it."""
    if "://" not in place:
        return {"storage_path": place}
    files, path = stores.opened(place)
    return {"storage_path": path, "storage_filesystem": files}


def run_group(
    function: Callable[[WorkerConfig], None],
    config: WorkerConfig,
    *,
    name: str,
    autoscaling: bool,
    state: str | None = None,
) -> None:
    """Run `function(config)` on every worker; a lost group is started again from its checkpoint.

    Args:
        name: of this attempt; Ray Train resumes its own state under a name it has seen.
        autoscaling: whether the cluster may get more nodes if it is asked for them.
        state: a URI where Ray Train keeps its own state; None: in the folder of the run.

    Raises:
        ray.train.TrainingFailedError: the group failed for good.
    """
    spec, run, store = config.spec, config.folder, Store(config.checkpoints)
    wanted = spec.resources
    gpus = {"GPU": wanted.gpus_per_worker} if wanted.gpus_per_worker else {}
    elastic = isinstance(wanted.workers, WorkersSpec)
    scaling_config = ray.train.ScalingConfig(
        num_workers=(wanted.fewest, wanted.most) if elastic else wanted.most,
        use_gpu=bool(gpus),
        resources_per_worker={"CPU": wanted.cpus_per_worker, **gpus},
        **({"elastic_resize_monitor_interval_s": wanted.workers.resize_every_s} if elastic else {}),  # type: ignore[union-attr]
    )
    failure_config = ray.train.FailureConfig(max_failures=spec.max_failures)
    own = spec.failures
    limits = Limits(spec.max_failures, own.non_finite, own.max_skipped, own.out_of_memory, own.exclude_node_after)
    parts = spec.training.parallel.sequence if spec.training else 1
    fewest = placement.Request(wanted.fewest, wanted.cpus_per_worker, wanted.gpus_per_worker)
    scaling: ElasticGroup | FixedSize | FixedSizeOfMore = (
        ElasticGroup(scaling_config, run, store, parts) if elastic else FixedSize(scaling_config)
    )
    if autoscaling and not elastic:
        scaling = FixedSizeOfMore(scaling_config)
    if own.straggler == "exclude":
        scaling.leaving = Leaving(run, partial(_newest, store))
    PolicyTrainer(
        partial(function, config),
        torch_config=InterfacesFirst(backend="nccl" if gpus else "gloo"),
        scaling_config=scaling_config,
        run_config=ray.train.RunConfig(
            name=name,
            **_kept_in(state or str(run.ray_state)),
            failure_config=failure_config,
            worker_runtime_env={"env_vars": warm.WORKER},
        ),
        scaling=scaling,
        failures=Failures(failure_config, run, store, limits, fewest),
        callback=Exclude(run),
    ).fit()
