"""The command line: `tandem <folder> <verb>`, `tandem quickstart` and `tandem doctor`.

Each folder's verbs live in its cli.py. Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli import app as cluster_app
from cluster.doctor.cli import doctor
from cluster.errors import UserError
from jobs.cli import app as jobs_app
from serve.cli import app as serve_app
from tracking.cli import app as tracking_app

_Given = tuple[Path | None, list[str]]
"""A spec's file and what is changed in it."""
QUESTION = "def read_text(self, encoding=None, errors=None):"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Carry a model from its first random weight to its thousandth concurrent user, on one Ray cluster.",
    epilog="Start with: tandem quickstart",
)
app.add_typer(cluster_app, name="cluster")
app.add_typer(jobs_app, name="jobs")
app.add_typer(serve_app, name="serve")
app.add_typer(tracking_app, name="tracking")
app.command()(doctor)


@app.command()
def quickstart() -> None:
    """Do the whole loop once, on this machine: cluster, pre-train, fine-tune, evaluate, quantise, register, serve, ask.

    It trains a small language model on the Python library's own source. Afterwards everything is still up to look at.
    """
    stages = Stages(total=9)
    stages.run("cluster", start_cluster)
    stages.run("pre-train", lambda: follow_training("stdlib-lm"))
    stages.run("fine-tune", lambda: follow_training("stdlib-lm-chat"))
    names = ("evaluate-stdlib-lm", "evaluate-stdlib-lm-chat", "quantize-stdlib-lm-chat")
    base, chat, quantized = map(_submit, names)  # side by side: most of their time is the start of their processes
    stages.run("evaluate", lambda: evaluate(*base))
    stages.run("evaluate", lambda: evaluate(*chat))
    stages.run("quantise", lambda: quantize(*quantized))
    stages.run("register", promote)
    endpoint = stages.run("serve", serve_up)
    stages.run("ask", lambda: ask(endpoint))
    typer.echo(farewell(endpoint))


class StageFailed(UserError):
    """A stage of the quickstart ended badly: what happened, and where its log is."""

    exit_code = 1


class Stages:
    """Number the stages, show each one's outcome and time, and say which one failed."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._number = 0

    def run(self, name: str, stage: Callable[[], tuple[str, Any]]) -> Any:
        """Run one stage. It returns the sentence to print and the value to pass on."""
        self._number += 1
        title = f"[{self._number}/{self._total}] {name}"
        began = time.monotonic()
        try:
            sentence, value = stage()
        except UserError as error:
            raise StageFailed(f"{title} failed after {time.monotonic() - began:.0f} s: {error}") from error
        typer.echo(f"{title:<16} {sentence} · {time.monotonic() - began:.0f} s")
        return value


def start_cluster() -> tuple[str, None]:
    """Start Ray and MLflow, and free the CPUs that an earlier quickstart's endpoint still holds."""
    from cluster import connect, local
    from serve import endpoints

    local.up(progress=_note)
    where = connect.connection()
    stopped = endpoints.down() if endpoints.status() else []
    ended = f", stopped the endpoint of an earlier run ({', '.join(stopped)})" if stopped else ""
    return f"Ray {where.ray_address}, MLflow {where.tracking_uri}{ended}", None


def follow_training(example: str) -> tuple[str, None]:
    """Run a training job from the examples."""
    result = _follow(*_submit(example))
    first, final = (result["evaluations"][label]["loss"] for label in ("first", "final"))
    return f"{result['model']}: held-out loss {first:.3f} → {final:.3f}", None


def evaluate(example: str, job_id: str) -> tuple[str, None]:
    """Wait for an evaluation job."""
    found = _follow(example, job_id)
    measured = found["evaluation"]
    loss, perplexity, bits = (measured[key] for key in ("loss", "perplexity", "bits_per_byte"))
    return f"{found['model']}: loss {loss:.3f}, perplexity {perplexity:.1f}, {bits:.2f} bits/byte", None


def quantize(example: str, job_id: str) -> tuple[str, None]:
    """Wait for the job that makes the int8 child of the fine-tuned model."""
    result = _follow(example, job_id)
    cost = result["quantization"]
    smaller = f"{cost['parent_bytes'] / 1e6:.1f} → {cost['bytes'] / 1e6:.1f} MB"
    return f"{result['model']}: int8 weights, {smaller}, held-out loss {100 * cost['loss_change']:+.2f} %", None


def promote() -> tuple[str, None]:
    """Give the candidates the alias that the endpoint follows."""
    from tracking import registry

    promoted = []
    for name in ("stdlib-lm", "stdlib-lm-chat"):
        candidate = registry.find_version(f"models:/{name}@candidate")
        promoted.append(registry.promote(name, candidate.version, "champion").uri)
    return f"{' and '.join(promoted)} are now @champion", None


def serve_up() -> tuple[str, str]:
    """Serve the fine-tuned model behind the OpenAI API."""
    from cluster import specfile
    from serve import endpoints
    from serve.deploy import plan
    from serve.spec import ServeSpec

    path = _examples("serve") / "chat.yaml"
    outcome = endpoints.up(plan.absolute(specfile.load(path, ServeSpec), path.parent), _note)
    return f"{', '.join(outcome['models'])} at {outcome['endpoint']}", outcome["endpoint"]


def ask(endpoint: str) -> tuple[str, None]:
    """Ask the endpoint over HTTP, as any OpenAI client would."""
    import openai

    client = openai.OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=2)
    answer = client.chat.completions.create(
        model="stdlib-lm-chat", messages=[{"role": "user", "content": QUESTION}], max_tokens=60, temperature=0
    )
    return f"{QUESTION}\n    → {answer.choices[0].message.content}\n   ", None


def farewell(endpoint: str) -> str:
    """Say where everything is, what to try and how to stop."""
    from cluster import connect, local

    cluster = local.state()
    body = f'{{"model": "stdlib-lm-chat", "messages": [{{"role": "user", "content": "{QUESTION}"}}]}}'
    lines = [
        "",
        f"MLflow         {connect.connection().tracking_uri}",
        f"Ray dashboard  {cluster.dashboard_url if cluster else connect.connection().jobs_address}",
        f"endpoint       {endpoint}",
        "",
        f"try:   curl {endpoint}/v1/chat/completions -H 'content-type: application/json' -d '{body}'",
        "or:    tandem serve chat",
        "stop:  tandem cluster down",
    ]
    return "\n".join(lines)


Overrides = Annotated[list[str], typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a key of SPEC.")]


@cluster_app.command()
def manifests(
    spec: Annotated[Path, typer.Argument(help="The deployment's YAML file.", metavar="SPEC")],
    job: Annotated[Path | None, typer.Option(help="A job's spec: a RayJob runs it.")] = None,
    serve: Annotated[Path | None, typer.Option(help="An endpoint's spec: a RayService serves it.")] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="A RayCluster too, beside a job or an endpoint.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder; - prints all.")] = Path("manifests"),
    set_: Overrides = [],  # noqa: B006 (typer's own way)
    job_set: Annotated[list[str], typer.Option(metavar="KEY.PATH=VALUE", help="Change a key of the job's spec.")] = [],  # noqa: B006
    serve_set: Annotated[
        list[str], typer.Option(metavar="KEY.PATH=VALUE", help="Change a key of the endpoint's spec.")
    ] = [],  # noqa: B006
) -> None:
    """Write Kubernetes manifests for KubeRay 1.7: a cluster that stays, or one of its own for a job and an endpoint.

    Nothing is sent anywhere: look at the files, then `kubectl apply -f`. A spec that could not work is refused.

    Example: tandem cluster manifests deployment.yaml --job jobs/specs/digits.yaml
    """
    from cluster.kubernetes import output as writing

    files, said = _manifests(spec, set_, (job, job_set), (serve, serve_set), with_cluster=cluster)
    for sentence in said:
        _note(sentence)
    if str(output) == "-":
        typer.echo("".join(files.values()), nl=False)
        return
    for path in writing.write(files, output):
        typer.echo(str(path))


def _manifests(
    path: Path, overrides: list[str], job: _Given, serve: _Given, *, with_cluster: bool
) -> tuple[dict[str, str], list[str]]:
    """Put the specs together: the one place that knows those of all folders."""
    from cluster import specfile
    from cluster.kubernetes import manifests, rules, syntax
    from cluster.kubernetes.spec import DeploymentSpec
    from jobs import work as job_work
    from serve import work as serve_work

    deployment = specfile.load(path, DeploymentSpec, overrides)
    jobs = job_work.read(job[0], job[1]) if job[0] else None
    jobs = replace(jobs, name=syntax.as_name(jobs.name)) if jobs else None
    service = serve_work.read(serve[0], serve[1]) if serve[0] else None
    service = replace(service, name=syntax.as_name(service.name)) if service else None
    files = {"job": job[0], "service": serve[0]}
    with_cluster = with_cluster or (jobs is None and service is None)
    if wrong := rules.mistakes(deployment, jobs, service, with_cluster=with_cluster):
        raise UserError("\n".join(rules.told(each, path, overrides, files) for each in wrong))
    made = manifests.build(deployment, jobs, service, with_cluster=with_cluster)
    named = [f"{kind}: called {work.name}" for kind, work in (("RayJob", jobs), ("RayService", service)) if work]
    return made, [*named, *manifests.told(deployment, jobs, service)]


@cluster_app.command()
def sbatch(
    spec: Annotated[Path, typer.Argument(help="The allocation's YAML file.", metavar="SPEC")],
    job: Annotated[Path, typer.Option(help="The job's spec, on a file system that the nodes see.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A file; - prints it.")] = Path("-"),
    set_: Overrides = [],  # noqa: B006 (typer's own way)
    job_set: Annotated[list[str], typer.Option(metavar="KEY.PATH=VALUE", help="Change a key of the job's spec.")] = [],  # noqa: B006
) -> None:
    """Write a batch script for Slurm: Ray on an allocation and one job, which saves before the limit and goes on.

    Example: tandem cluster sbatch slurm.yaml --job jobs/specs/digits.yaml > digits.sbatch && sbatch digits.sbatch
    """
    from cluster import specfile
    from cluster.kubernetes import output as writing
    from cluster.slurm import script
    from cluster.slurm.spec import SlurmSpec
    from jobs import work as job_work

    allocation, wanted = specfile.load(spec, SlurmSpec, set_), job_work.read(job, job_set)
    if wrong := list(script.mistakes(allocation, wanted)):
        raise UserError("\n".join(f"{specfile.place(spec, key, set_)}: `{key}`: {what}" for key, what in wrong))
    text = script.build(allocation, wanted, job.absolute(), job_set)
    if str(output) == "-":
        typer.echo(text, nl=False)
        return
    for path in writing.write({output.name: text}, output.parent):
        typer.echo(str(path))


def _submit(example: str) -> tuple[str, str]:
    from jobs import submit

    return example, submit.submit(_examples("jobs") / f"{example}.yaml", [])


def _follow(example: str, job_id: str) -> dict[str, Any]:
    from jobs import submit
    from jobs.live import LiveView

    with LiveView(example) as view:
        outcome = submit.follow(job_id, view.line)
    if outcome.status != "SUCCEEDED":
        why = outcome.error or "\n".join(["", *outcome.log[-15:]])
        raise StageFailed(f"job {job_id} {outcome.status.lower()}: {why}\nits log: tandem jobs logs {job_id}")
    return outcome.result


def _examples(folder: str) -> Any:
    import importlib

    return Path(str(importlib.import_module(folder).__file__)).parent / "specs"


def _note(message: str) -> None:
    typer.echo(f"  {message}", err=True)


def main() -> None:
    """Run the command line; a user's mistake ends with one clear message and exit code 2, never a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
