"""`tandem tracking`: runs, models and which version an alias means."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tracking.history import RunSummary
    from tracking.plan_errors import Beside, Compared
    from tracking.registry import ModelVersion

app = typer.Typer(
    no_args_is_help=True,
    help="What happened: runs, model versions and their aliases, as the MLflow server has them.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command("runs")
def list_runs(
    name: Annotated[str | None, typer.Argument(help="Only runs whose name contains this.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="How many, newest first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List runs with status, duration, last loss and evaluation.

    Example: tandem tracking runs stdlib-lm --limit 5
    """
    from dataclasses import asdict

    from tracking.history import runs

    found = runs(limit, name)
    if as_json:
        _print_json([asdict(run) for run in found])
    elif found:
        _print_table(["name", "phase", "status", "started", "duration", "loss", "evaluation"], map(_run_row, found))
    else:
        typer.echo("no runs yet: start one with `tandem jobs submit SPEC`", err=True)


@app.command("plan-errors")
def list_plan_errors(
    name: Annotated[str | None, typer.Argument(help="Only runs whose name contains this.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=100_000, help="How many, newest first.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Show how far plans were off: peak memory and step time, planned beside measured, with median and worst error.

    Example: tandem tracking plan-errors stdlib-lm
    """
    from dataclasses import asdict

    from tracking.plan_errors import compared, spread

    found = compared(limit, name)
    spreads = {"memory": spread(run.memory.error for run in found), "step": spread(run.step.error for run in found)}
    if as_json:
        runs = [asdict(run) | {"memory_error": run.memory.error, "step_error": run.step.error} for run in found]
        _print_json({"runs": runs, **{key: each and asdict(each) for key, each in spreads.items()}})
        return
    if not found:
        typer.echo("no runs yet of which something planned was measured", err=True)
        return
    _print_table(["name", "trained by", "memory planned", "measured", "error", "step planned", "measured", "error"],
                 map(_compared_row, found))  # fmt: skip
    for what, each in (("peak memory", spreads["memory"]), ("step time", spreads["step"])):
        if each is not None:
            typer.echo(f"{what}: median error {each.median:.1%}, worst {each.worst:.1%}, of {each.runs} runs")


def _compared_row(run: "Compared") -> list[str]:
    def cells(of: "Beside", unit: Callable[[float], str]) -> list[str]:
        error = "" if of.error is None else f"{of.error:+.1%}"
        return [*("" if value is None else unit(value) for value in (of.planned, of.measured)), error]

    memory, step = cells(run.memory, lambda value: _size(int(value))), cells(run.step, lambda value: f"{value:.3g} s")
    return [run.name, run.layout, *memory, *step]


@app.command("models")
def list_models(
    name: Annotated[str | None, typer.Argument(help="Only versions of this model.")] = None,
    as_json: AsJson = False,
) -> None:
    """List model versions with aliases, size, evaluation and quantisation.

    Example: tandem tracking models stdlib-lm
    """
    from tracking.registry import versions

    found = versions(name)
    if as_json:
        _print_json([_version_record(version) for version in found])
    elif found:
        columns = ["model", "version", "aliases", "size", "evaluation", "quantisation", "registered"]
        _print_table(columns, map(_version_row, found))
    else:
        typer.echo("no models yet: a job registers one when its spec has a `register` section", err=True)


@app.command("upload")
def upload(
    folder: Annotated[Path, typer.Argument(help="A model's folder.")],
    uri: Annotated[str, typer.Argument(help="Where its files go: s3://bucket/folder, or what else pyarrow knows.")],
    register: Annotated[str | None, typer.Option(help="Register it as a version of this model.")] = None,
    alias: Annotated[str | None, typer.Option(help="The alias of that version.")] = None,
) -> None:
    """Put a model's folder into an object store, from where each node fetches it when it needs it.

    Example: tandem tracking upload ./model s3://bucket/models/lm-3 --register lm --alias candidate
    """
    from cluster import stores
    from tracking import model_store, registry
    from tracking.errors import TrackingError

    if alias is not None and register is None:
        raise TrackingError(f"--alias {alias} is the alias of a version: name the model with --register")
    digest = model_store.put(folder, uri)
    typer.echo(f"{stores.shown(uri)} holds the model, SHA-256 of its folder.json {digest[:12]}")
    if register is not None:
        typer.echo(f"registered {registry.register(register, uri, run_id=None, alias=alias).uri}")


@app.command("sync")
def sync_runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Folders with runs below them; default $TANDEM_HOME/storage/runs.")
    ] = None,
) -> None:
    """Tell the server what it missed while it was away: metrics, how the runs ended, the models they made.

    A run that cannot be told is named and passed over; the exit code is 1 then.

    Example: tandem tracking sync
    """
    from cluster.home import home
    from tracking import outbox

    waiting = [spool for folder in folders or [home() / "storage" / "runs"] for spool in outbox.pending(folder)]
    untold = [spool for spool in waiting if not _is_told(spool)]
    if not waiting:
        typer.echo("nothing waits: the server knows everything")
    if untold:
        typer.echo(f"{len(untold)} of {len(waiting)} runs could not be told", err=True)
        raise typer.Exit(1)


def _is_told(spool: Path) -> bool:
    """Settle one run and say how that went.

    Raises:
        ServerUnreachable: the others cannot be told either.
    """
    from tracking import outbox
    from tracking.errors import ServerUnreachable, TrackingError

    try:
        typer.echo(f"{spool.parent.name}: {outbox.settle(spool)} records sent")
        return True
    except ServerUnreachable:
        raise
    except (TrackingError, OSError) as error:
        typer.echo(f"{spool.parent.name}: not told: {error}", err=True)
        return False


@app.command("promote")
def promote_version(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    version: Annotated[int, typer.Argument(min=1, help="The version that the alias shall mean.")],
    alias: Annotated[str, typer.Option("--alias", "-a", help="For example champion or candidate.")],
) -> None:
    """Make an alias mean this version; an endpoint that names the alias follows at its next `tandem serve up`.

    Example: tandem tracking promote stdlib-lm 3 --alias champion
    """
    from tracking.registry import promote

    promoted = promote(name, version, alias)
    typer.echo(f"models:/{name}@{alias} is now version {promoted.version}")


def _run_row(run: "RunSummary") -> list[str]:
    loss = "" if run.loss is None else f"{run.loss:.4g}"
    return [
        run.name,
        run.phase or "",
        run.status,
        _moment(run.started_at_ms),
        _duration(run.duration_s),
        loss,
        _numbers(run.evaluation),
    ]


def _version_row(version: "ModelVersion") -> list[str]:
    return [
        version.name,
        str(version.version),
        ", ".join(version.aliases),
        _size(version.size_bytes),
        _numbers(version.evaluation),
        version.quantization or "none",
        _moment(version.created_at_ms),
    ]


def _version_record(version: "ModelVersion") -> dict[str, object]:
    return {
        "name": version.name,
        "version": version.version,
        "uri": version.uri,
        "source": version.source,
        "run_id": version.run_id,
        "aliases": list(version.aliases),
        "size_bytes": version.size_bytes,
        "evaluation": version.evaluation,
        "quantization": version.quantization,
        "base": version.base,
        "created_at_ms": version.created_at_ms,
    }


def _numbers(values: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in values.items())


def _moment(time_ms: int) -> str:
    """Format in the reader's own time zone."""
    from datetime import datetime

    return datetime.fromtimestamp(time_ms / 1000).strftime("%Y-%m-%d %H:%M")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{seconds:.0f}s"


def _size(size_bytes: int) -> str:
    from rich.filesize import decimal

    return decimal(size_bytes) if size_bytes else ""


def _print_json(content: object) -> None:
    import json

    typer.echo(json.dumps(content, indent=2))


def _print_table(columns: list[str], rows: Iterable[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a name in brackets is no markup
    Console().print(table)
