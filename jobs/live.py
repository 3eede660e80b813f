"""The live view of a followed job: a progress bar for people, plain lines for logs."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from jobs.progress import Progress, Throttle

DESCRIPTIONS = {
    "read": "reading the data",
    "fit": "fitting the tokenizer or the labels",
    "encode": "encoding",
    "start": "starting the workers",
    "train": "training",
    "evaluate": "evaluating",
    "measure": "measuring",
    "quantize": "quantising",
    "predict": "predicting",
    "write": "writing the output",
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

    def line(self, text: str, meaning: Progress | None) -> None:
        """Take one line of the job's log."""
        if meaning is not None:
            self._show(meaning)
        elif self._verbose or text.startswith("tandem: "):
            self._print(text.removeprefix("tandem: "))

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
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
