"""The live view of a followed job: a progress bar for people, plain lines for logs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from jobs import trial_table
from jobs.progress import Progress, Throttle
from jobs.trial_table import TrialLine

DESCRIPTIONS = {
    "digest": "looking whether the data is known",
    "read": "reading the data",
    "fit": "fitting the task to the data",
    "encode": "encoding",
    "reference": "asking the reference",
    "start": "starting the workers",
    "train": "training",
    "evaluate": "evaluating",
    "measure": "measuring",
    "quantize": "quantising",
    "predict": "predicting",
    "write": "writing the output",
    "sweep": "trials ended",
}


class LiveView:
    """Show a job's progress on stderr; its other lines only if `verbose`."""

    def __init__(self, title: str, verbose: bool = False) -> None:
        self._title = title
        self._verbose = verbose
        self._bar: Any = None
        self._task: Any = None
        self._throttle = Throttle(10.0)
        self._phase = ""
        self._trials: dict[int, TrialLine] = {}
        if sys.stderr.isatty():
            self._bar = _progress_bar()
            self._task = self._bar.add_task(title, total=None, detail="sent to the cluster")

    def __enter__(self) -> LiveView:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
            self._bar.leave_trials()

    def line(self, text: str, meaning: Progress | None) -> None:
        """Take one line of the job's log."""
        if meaning is not None:
            self._show(meaning)
        elif (trial := trial_table.parse(text)) is not None:
            self._show_trial(trial)
        elif self._verbose or text.startswith("tandem: "):
            self._print(text.removeprefix("tandem: "))

    def _show_trial(self, trial: TrialLine) -> None:
        """Renew the table for people; for logs, say how a trial ended, and now and then how one goes on."""
        if trial.best:
            self._trials = {number: replace(line, best=False) for number, line in self._trials.items()}
        self._trials[trial.number] = trial
        if self._bar:
            self._bar.show_trials(trial_table.columns(self._trials.values()))
        elif trial.state != "running" or self._throttle.ready():
            self._print(trial_table.sentence(trial))

    def _print(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _show(self, now: Progress) -> None:
        detail = f"{DESCRIPTIONS.get(now.phase, now.phase)} {describe(now)}"
        if self._bar:
            done = now.phase in ("read", "fit", "start", "quantize") and now.total == 1
            self._bar.update(
                self._task, completed=now.done, total=None if done else now.total, detail=detail, refresh=True
            )
        elif now.phase != self._phase or now.done == now.total or self._throttle.ready():
            self._phase = now.phase
            print(f"{self._title}: {detail}", file=sys.stderr, flush=True)


def describe(now: Progress) -> str:
    """Say how far a phase is, in the words of its values: step, loss, rate, time left."""
    parts = [f"{now.done:,}/{now.total:,}"] if now.total > 1 else []
    for key, value in now.values.items():
        if key.endswith("_per_second"):
            parts.append(f"{value:,.0f} {key.removesuffix('_per_second')}/s")
        elif key == "eta_s":
            parts.append(f"{_clock(value)} left")
        elif key in ("loss", "eval_loss", "eval_accuracy"):
            parts.append(f"{key.replace('eval_', 'held-out ')} {value:.4g}")
    return " · ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _progress_bar() -> Any:
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table

    class Bar(Progress):
        """A progress bar below the table of a sweep's trials, if the job is one."""

        rows: Sequence[Sequence[str]] = ()

        def show_trials(self, rows: Sequence[Sequence[str]]) -> None:
            self.rows = rows
            self.refresh()

        def leave_trials(self) -> None:
            """Print the table a last time: the bar goes with its end."""
            for table in self._table():
                self.console.print(table)

        def _table(self) -> Iterable[Table]:
            if self.rows:
                heading, *lines = self.rows
                table = Table(*heading, box=None)
                for line in lines:
                    table.add_row(*line)
                yield table

        def get_renderables(self) -> Iterable[RenderableType]:
            yield from self._table()
            yield from super().get_renderables()

    return Bar(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
