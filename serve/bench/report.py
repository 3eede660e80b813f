"""One run from its settings to its results: warm-up, load, figures, and where they are shown and written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from serve.bench import figures, processes, warming
from serve.bench.drive import Part
from serve.bench.record import Record
from serve.bench.settings import Settings

Say = Callable[[str], None]
BUSY_SHARE = 0.8
"""Of a CPU: beyond it a process of the client may itself be what is slow."""


@dataclass(frozen=True)
class Result:
    """A run's figures, and the records that they are of."""

    told: dict[str, Any]
    records: list[Record]


def run(settings: Settings, say: Say = lambda _: None, each_request: bool = False, quiet: bool = False) -> Result:
    """Find the model, warm it up, send the load.

    Args:
        settings: what to send; a model of "" is the first there.
        say: told what was done beside the measured requests.
        each_request: whether the result lists every request.
        quiet: show no progress.

    Raises:
        UserError: the endpoint does not answer, has no such model, or refuses every request of the warm-up.
    """
    warm = processes.run_loop(warming.warm(settings))
    settings = replace(settings, model=warm.model)
    for line in warm.said:
        say(line)
    began = time.time()
    with _Progress(settings, quiet) as progress:
        parts = processes.run(settings, warm.rate, progress.advance)
    records = sorted((found for part in parts for found in part.records), key=lambda found: found.number)
    told = {
        "settings": settings.told(),
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        **figures.summary(records, dict(settings.slo), settings.rate is not None),
        "warm_up": {"requests": warm.requests, "said": warm.said},
        "client": of_client(parts),
        "server": warm.server,
        "host": of_host(),
    }
    if each_request:
        told["each_request"] = [found.told() for found in records]
    return Result(told, records)


def of_client(parts: Sequence[Part]) -> dict[str, Any]:
    """Return what the load generator itself took: CPU seconds in each second of each process."""
    shares = [round(part.cpu_s / max(part.wall_s, 1e-9), 3) for part in parts]
    busy = [share for share in shares if share > BUSY_SHARE]
    warning = (
        f"{len(busy)} of {len(parts)} sending processes used more than {BUSY_SHARE:.0%} of a CPU: what is measured may "
        "be the client; use more --processes"
        if busy
        else None
    )
    return {"processes": len(parts), "cpu_share": shares, "event_loop": processes.loop_name(), "warning": warning}


def of_host() -> dict[str, Any]:
    """Return where it ran and with which versions."""
    versions = {name: importlib.metadata.version(name) for name in ("httptools", "numpy")}
    try:
        versions["tandem-ray"] = importlib.metadata.version("tandem-ray")
    except importlib.metadata.PackageNotFoundError:
        versions["tandem-ray"] = "from source"
    return {"cpu": _cpu(), "cpus": os.cpu_count(), "load_average": os.getloadavg(), "system": platform.platform(),
            "python": platform.python_version(), "versions": versions}  # fmt: skip


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(result: Result, out: Path | None, with_plot: bool = True) -> list[Path]:
    """Write the JSON and the plot; returns their paths. Raises UserError when they cannot be written."""
    base = out or Path(time.strftime("bench-%Y%m%d-%H%M%S"))
    paths = [base.with_name(base.name + suffix) for suffix in ((".json", ".svg") if with_plot else (".json",))]
    try:
        paths[0].write_text(json.dumps(result.told, indent=2) + "\n", encoding="utf-8")
        if with_plot:
            from serve.bench import plot

            plot.write(result.records, result.told, paths[1])
    except OSError as error:
        raise UserError(f"--out: the results cannot be written: {error}") from None
    return paths


def show(result: Result) -> None:
    """Print the figures as tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    told, console = result.told, Console(highlight=False)
    console.print("\n".join(sentences(told)), markup=False)
    columns = ("mean", *(f"p{at}" for at in figures.PERCENTILES), "max")
    table = Table("ms", "count", *columns, box=box.SIMPLE)
    for name, row in _rows(told):
        table.add_row(name, f"{row['count']:,}", *(f"{row[column]:,.1f}" for column in columns))
    console.print(table)


def _rows(told: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    rows = list(told["latency_ms"].items())
    for caller, found in told.get("callers", {}).items():
        rows += [
            (f"{name} of {caller}", found["latency_ms"][name])
            for name in ("ttft", "e2e")
            if name in found["latency_ms"]
        ]
    return rows


def sentences(told: dict[str, Any]) -> list[str]:
    """Return what happened in sentences, failures among them."""
    counts, rates, client = told["requests"], told["rates"], told["client"]
    failed = [f"{count} {kind}" for kind, count in counts["failed_otherwise"].items()]
    failed += [f"{counts[kind]} {kind.replace('_', ' ')}" for kind in ("cut_streams", "unfinished") if counts[kind]]
    lines = [
        f"{counts['completed']:,} of {counts['sent']:,} requests completed in {told['duration_s']:.1f} s, "
        f"{counts['rejected_429']:,} rejected with 429, failed: {', '.join(failed) or 'none'}",
        *(f"  {kind}: {words}" for kind, words in counts["said"].items()),
        f"{rates['requests_per_second']:,.1f} requests/s, {rates['completion_tokens_per_second']:,.0f} generated and "
        f"{rates['prompt_tokens_per_second']:,.0f} prompt tokens/s in the {told['sending_s']:.1f} s until the load "
        f"grew less; what then ran took {told['drain_s']:.1f} s more",
        f"the client used {', '.join(f'{share:.0%}' for share in client['cpu_share'])} of a CPU",
    ]
    if "slo" in told:
        slo = told["slo"]
        bounds = ", ".join(f"{name} {bound:g} s" for name, bound in slo["bounds_s"].items())
        lines.append(
            f"goodput ({bounds}): {slo['goodput_requests_per_second']:,.2f} requests/s, {slo['share']:.1%} of all"
        )
    if "fairness" in told:
        indices = {name: value for name, value in told["fairness"].items() if name != "shares_are_of"}
        of = told["fairness"].get("shares_are_of", "tokens")
        said = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in indices.items()]
        lines.append(", ".join(said) + ("" if of == "tokens" else f" (shares are of {of})"))
    if rates["answers_without_usage"]:
        lines.append(f"{rates['answers_without_usage']} answers told no usage: their tokens are in no rate")
    return [*lines, *([f"note: {client['warning']}"] if client["warning"] else [])]


class _Progress:
    """A bar that shows how far a run is, by requests or by time, whichever is nearer to its end."""

    def __init__(self, settings: Settings, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._settings, self._began, self._ended, self._failed = settings, time.monotonic(), 0, 0
        columns = (BarColumn(), TextColumn("{task.fields[said]}"), TimeElapsedColumn())
        self._bar = Progress(
            *columns, console=Console(stderr=True), disable=quiet, refresh_per_second=4, transient=True
        )
        self._task = self._bar.add_task("load", total=1.0, said="")

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, ended: int, failed: int) -> None:
        """Count more requests that ended."""
        self._ended += ended
        self._failed += failed
        spent = (time.monotonic() - self._began) / self._settings.seconds
        if self._bar.disable:
            return
        done = min(1.0, max(spent, self._ended / self._settings.requests))
        self._bar.update(self._task, completed=done, said=f"{self._ended:,} ended, {self._failed:,} not whole")
