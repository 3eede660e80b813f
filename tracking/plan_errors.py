"""How far plans were off: of each run what was planned beside what was measured, and the errors over all of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tracking.client import ask, connect
from tracking.history import named

PLANNED_MEMORY = "plan_peak_memory_bytes"
PLANNED_STEP = "plan_step_time_s"
MEASURED_MEMORY = "plan_measured_peak_memory_bytes"
MEASURED_STEP = "plan_measured_step_time_s"
"""Metrics of a run (jobs/driver/planned.py): of the rank that took most memory, and of the median step."""
ENERGY = "energy_joules"
"""Metric of a run: what the GPUs of all its ranks took, where NVML tells."""
LAYOUT_TAG = "tandem.plan"
"""Tag of a run: workers, ZeRO stage, offload and precision, and what the planned time goes by."""
PAGE = 1000


@dataclass(frozen=True)
class Beside:
    """A planned figure and the measured one; None: not known."""

    planned: float | None
    measured: float | None

    @property
    def error(self) -> float | None:
        """The planned one is so much above the measured one, as a share of that."""
        if self.planned is None or not self.measured:
            return None
        return self.planned / self.measured - 1


@dataclass(frozen=True)
class Compared:
    """One run's plan."""

    run_id: str
    name: str
    layout: str
    memory: Beside
    step: Beside


@dataclass(frozen=True)
class Spread:
    """Errors over several runs, without their signs."""

    runs: int
    median: float
    worst: float


def compared(limit: int, name: str | None = None, tracking_uri: str | None = None) -> list[Compared]:
    """Return the newest runs of which something planned was measured, newest first.

    Args:
        name: keeps runs whose name contains it.
    """
    client = connect(tracking_uri)
    experiments = [each.experiment_id for each in ask(client, client.search_experiments)]
    query, token, found = named(name), None, list[Compared]()
    while len(found) < limit:
        page = ask(
            client,
            lambda token=token: client.search_runs(  # type: ignore[misc]
                experiments, query, max_results=PAGE, order_by=["start_time DESC"], page_token=token
            ),
        )
        found += [run for raw in page if _is_known(run := of_run(raw))]
        token = page.token
        if not token:
            break
    return found[:limit]


def of_run(raw: Any) -> Compared:
    """Read a run of MLflow's. Pure."""
    values: Mapping[str, float] = raw.data.metrics
    return Compared(
        raw.info.run_id,
        raw.info.run_name,
        raw.data.tags.get(LAYOUT_TAG, ""),
        Beside(values.get(PLANNED_MEMORY), values.get(MEASURED_MEMORY)),
        Beside(values.get(PLANNED_STEP), values.get(MEASURED_STEP)),
    )


def _is_known(run: Compared) -> bool:
    return run.memory.error is not None or run.step.error is not None


def spread(errors: Iterable[float | None]) -> Spread | None:
    """Return how large errors are; None where there is none. Pure."""
    sizes = [abs(error) for error in errors if error is not None]
    return Spread(len(sizes), statistics.median(sizes), max(sizes)) if sizes else None
