"""`tandem jobs …`: validate, plan, submit, profile, follow, list, stop."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from jobs.spec import JobSpec
    from jobs.submit import Outcome

app = typer.Typer(no_args_is_help=True, help="Train, fine-tune, evaluate and quantise models, one YAML file per job.")

SpecPath = Annotated[Path, typer.Argument(help="The job's YAML file; `jobs/specs/` holds examples.", metavar="SPEC")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY.PATH=VALUE",
        help="Change a key of the spec, for instance --set training.steps=1000; may be repeated. The value is YAML.",
    ),
]
JobId = Annotated[str, typer.Argument(help="The job's id, as `tandem jobs list` shows it.", metavar="JOB")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def _number(given: float | None) -> float | None:
    """Refuse what is no finite number."""
    if given is not None and not isfinite(given):
        raise typer.BadParameter(f"{given} is no finite number")
    return given


@app.command()
def validate(spec: SpecPath, set_: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006 (typer's own way)
    """Check a spec without a cluster, and print it with all defaults.

    What is known here of its data and of what it starts from is looked at too: files, an architecture's config, a
    folder, a version where the registry answers.

    Example: tandem jobs validate jobs/specs/stdlib-lm.yaml --set training.steps=1000
    """
    import json

    import yaml

    from cluster import shadows, specfile
    from cluster.errors import check_all
    from jobs import first_look, noise, parents, spec_unused, sweep_models
    from jobs.driver import storage
    from jobs.spec import JobSpec
    from jobs.worker import zero

    checked, base = specfile.load(spec, JobSpec, set_), spec.absolute().parent
    noise.quiet()
    notes: list[str] = spec_unused.unused(checked)
    check_all(
        lambda: shadows.check_own_module(checked.task.name, base),
        lambda: zero.read_named(checked.training, base),
        lambda: storage.check_named(checked, base),
        lambda: parents.check_architecture(checked, base),
        lambda: sweep_models.check(checked, base),
        lambda: notes.extend(
            filter(None, [parents.preflight(checked, base, also=first_look.check, unchecked=notes.append)])
        ),
        lambda: notes.extend(first_look.look_at_data(checked, base)),
    )
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    resolved = checked.resolved()
    print(json.dumps(resolved, indent=2) if as_json else yaml.safe_dump(resolved, sort_keys=False), end="")


MaybeSpec = Annotated[Path | None, typer.Argument(help="The job's YAML file; --calibrate needs none.", metavar="SPEC")]
KnownDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="h100, h100-pcie, h200, b200, a100-80, a100-40, a100-80-pcie, a100-40-pcie, l40s, l4 or rtx-4090. Left "
        "out: this machine's CPUs.",
    ),
]
Devices = Annotated[
    int | None, typer.Option("--devices", min=1, help="How many, one a worker. Left out: resources.workers.")
]
Mfu = Annotated[
    float,
    typer.Option("--mfu", min=0.01, max=1.0, callback=_number, help="Share of its peak FLOP/s that a device reaches."),
]
Price = Annotated[
    float | None,
    typer.Option("--price-per-hour", min=0.0, callback=_number, help="Of one device; the cost is in its currency."),
]
PriceFile = Annotated[
    Path | None,
    typer.Option(
        "--prices",
        help="A YAML or JSON file: `per_hour: {h100: 2.5}`, and `currency: EUR` if you like. Left out: "
        "$TANDEM_HOME/prices.yaml, if it is there.",
    ),
]
Users = Annotated[
    int | None, typer.Option("--users", min=1, help="How many replicas serve so many users at once, too.")
]
UserRate = Annotated[float, typer.Option("--tokens-per-second", min=0.001, callback=_number, help="Of each user.")]
UserContext = Annotated[
    int | None, typer.Option("--context", min=1, help="Tokens of prompt and answer. Left out: task.sequence_length.")
]
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate",
        help="First measure this machine for some minutes, while nothing else runs; kept in $TANDEM_HOME. With "
        "SPEC: at its precision and threads.",
    ),
]


@app.command()
def plan(
    spec: MaybeSpec = None,
    set_: Overrides = [],  # noqa: B006
    device: KnownDevice = None,
    devices: Devices = None,
    mfu: Mfu = 0.4,
    price_per_hour: Price = None,
    prices: PriceFile = None,
    users: Users = None,
    tokens_per_second: UserRate = 20.0,
    context: UserContext = None,
    calibrate: Calibrate = False,
    as_json: AsJson = False,
) -> None:
    """Estimate a job's memory by ZeRO stage, its time, tokens and cost. Needs no cluster, and starts no job.

    Neither weights nor, for a language model, data need be there: the model is built without memory.

    Example: tandem jobs plan my-70b.yaml --device h100 --devices 64
    """
    import json
    from dataclasses import replace

    from cluster import specfile
    from cluster.errors import UserError
    from jobs import noise
    from jobs.spec import JobSpec

    if spec is None and not calibrate:
        raise UserError("jobs plan: name a SPEC, or add --calibrate to measure this machine")
    checked = None if spec is None else specfile.load(spec, JobSpec, set_)
    noise.quiet()
    from jobs.plan import plan as planner
    from jobs.plan import prices as tables
    from jobs.plan import settled, table

    if prices is not None and price_per_hour is not None:
        raise UserError("--prices and --price-per-hour both say what a device costs: give one of them")
    if calibrate:
        _calibrate(checked)
    if spec is None or checked is None:
        return
    known = None if price_per_hour is not None else tables.find(prices)
    base = spec.absolute().parent
    asked = planner.Asked(device, devices, mfu, users, tokens_per_second, context)
    made = settled.planned(checked, base, asked, lambda key: specfile.place(spec, key, set_))
    price, said = tables.of(made.device, price_per_hour, known)
    made = replace(made, said=[*made.said, *said])
    if as_json:
        print(json.dumps(table.as_json(made, price), indent=2))
    else:
        table.show(made, price)


def _calibrate(spec: JobSpec | None) -> None:
    """Measure this machine at a spec's precision and threads, and keep what was measured."""
    import torch

    from cluster.home import home
    from cluster.precision import resolve, this_device
    from jobs.plan import calibrate, rates

    training = spec.training if spec else None
    threads = max(1, int(spec.resources.cpus_per_worker)) if spec else 1
    on_gpu = torch.cuda.is_available() and (spec is None or spec.resources.gpus_per_worker > 0)
    precision = resolve(training.precision if training else "auto", [this_device(on_gpu)])

    def say(said: str) -> None:
        typer.echo(f"measuring {said}", err=True)

    for found in calibrate.measure(precision, threads, on_gpu, say):
        typer.echo(f"{found.said}: kept in {rates.keep(home(), found)}", err=True)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a job spec, for an editor or a program.

    Example: tandem jobs schema > jobspec.json
    """
    import json

    from jobs.spec import JobSpec

    print(json.dumps(JobSpec.model_json_schema(), indent=2))


@app.command()
def submit(
    spec: SpecPath,
    set_: Overrides = [],  # noqa: B006
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show progress until the job ends.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="With --follow: show the whole log.")] = False,
) -> None:
    """Send a job to the cluster. With --follow the exit code is 0 if the job finished, 2 if its data is wrong, else 1.

    Example: tandem jobs submit jobs/specs/stdlib-lm.yaml --follow
    """
    from cluster import shadows
    from jobs import submit as jobs_submit

    if kept := shadows.note(spec.absolute().parent):
        typer.echo(kept, err=True)
    job_id = jobs_submit.submit(spec, set_)
    print(job_id, flush=True)  # who reads it through a pipe need not wait for the plan
    if follow:
        _follow(job_id, verbose)
    else:
        typer.echo(f"watch it: tandem jobs logs {job_id} --follow   stop it: tandem jobs stop {job_id}", err=True)
        if planned := jobs_submit.planned(spec, set_):  # the job is on its way; its own log says the same
            typer.echo(planned, err=True)


@app.command()
def profile(
    spec: SpecPath,
    set_: Overrides = [],  # noqa: B006
    steps: Annotated[
        int, typer.Option("--steps", min=1, max=100, help="How many steps to record, after four to warm up.")
    ] = 3,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the whole log meanwhile.")] = False,
) -> None:
    """Take a job's first steps under torch's profiler, and print its costliest operators.

    The cluster prepares the data and runs the job's workers as `submit` does; after four steps, --steps are recorded.
    The table adds up, over these steps on rank 0, what each operator took itself, without those that it calls: of the
    GPU where there is one, else of the CPU. For each worker, a trace (open it in https://ui.perfetto.dev or
    chrome://tracing) and a longer table are in the run's folder, `profile/`, and in MLflow.

    No model, no checkpoint and no evaluation come of it, and it touches nothing that the job itself has saved.

    Example: tandem jobs profile jobs/specs/stdlib-lm.yaml --steps 3 --set training.deepspeed.zero_stage=3
    """
    import json

    from jobs import profiled
    from jobs import submit as jobs_submit

    found = _follow(jobs_submit.submit(spec, set_, profile=steps), verbose).result["operators"]
    print(json.dumps(found, indent=2) if as_json else profiled.text(profiled.Profile.of(found)))


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the cluster's jobs, newest first.

    Example: tandem jobs list
    """
    import json
    from datetime import datetime

    from rich.console import Console
    from rich.table import Table

    from jobs import submit as jobs_submit

    jobs = jobs_submit.list_jobs()
    if as_json:
        print(json.dumps(jobs, indent=2))
        return
    table = Table("job", "name", "phase", "status", "started", "took", box=None)
    for job in jobs:
        began, ended = job["started_ms"], job["ended_ms"]
        started = datetime.fromtimestamp(began / 1000).strftime("%Y-%m-%d %H:%M:%S") if began else ""
        took = f"{(ended - began) / 1000:.0f} s" if began and ended else ""
        table.add_row(job["id"], job["name"], job["phase"], job["status"], started, took)
    Console().print(table if jobs else "no jobs yet; send one with `tandem jobs submit SPEC --follow`")


@app.command()
def logs(
    job: JobId, follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False
) -> None:
    """Print what a job has printed.

    Example: tandem jobs logs stdlib-lm-1a2b3c --follow
    """
    from jobs import submit as jobs_submit

    if follow:
        jobs_submit.known(job)
        _follow(job, verbose=True)
    else:
        print(jobs_submit.logs(job), end="")


@app.command()
def stop(job: JobId) -> None:
    """Stop a job; it writes a checkpoint first, and the same spec submitted again goes on from it.

    Example: tandem jobs stop stdlib-lm-1a2b3c
    """
    from jobs import submit as jobs_submit

    stopped = jobs_submit.stop(job)
    print(f"{job}: {'stopping' if stopped else 'had ended already'}")


def _follow(job_id: str, verbose: bool) -> Outcome:
    """Show a job until it ends; return how it ended, which was well: else this ends the command."""
    from cluster.errors import UserError
    from jobs import submit as jobs_submit
    from jobs.live import LiveView

    try:
        with LiveView(job_id, verbose) as view:
            outcome = jobs_submit.follow(job_id, view.line)
    except KeyboardInterrupt:
        typer.echo(
            f"\ndetached; the job goes on. Come back: tandem jobs logs {job_id} --follow   "
            f"stop it: tandem jobs stop {job_id}",
            err=True,
        )
        raise typer.Exit(130) from None
    if outcome.status != "SUCCEEDED":
        if outcome.error is None and not verbose:
            typer.echo("\n".join(outcome.log[-20:]), err=True)
        if outcome.error is None and outcome.message:
            typer.echo(f"{job_id}: {outcome.message}", err=True)
        typer.echo(f"{job_id}: {outcome.status.lower()}; its log: tandem jobs logs {job_id}", err=True)
        raise typer.Exit(2 if outcome.exit_code == UserError.exit_code else 1)
    made = next((outcome.result[key] for key in ("output", "profile", "model") if outcome.result.get(key)), "")
    typer.echo(f"{job_id}: finished {made}", err=True)
    return outcome
