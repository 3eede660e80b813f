"""`tandem serve …`: up, status, chat, down."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from serve.bench.cli import bench
from serve.keys import cli as keys

app = typer.Typer(
    no_args_is_help=True,
    help="Serve models over HTTP: OpenAI's API for text, the Open Inference Protocol for the rest.",
)

app.add_typer(keys.app, name="keys")
app.command()(keys.usage)
app.command()(bench)

SpecPath = Annotated[
    Path, typer.Argument(help="The endpoint's YAML file; `serve/specs/` holds examples.", metavar="SPEC")
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY.PATH=VALUE",
        help="Change a key of the spec, for instance --set http.port=9000; may be repeated. The value is YAML.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


@app.command()
def up(
    spec: SpecPath,
    host: Annotated[str | None, typer.Option("--host", help="Listen here: http.host of the spec.")] = None,
    set_: Overrides = [],  # noqa: B006 (typer's own way)
    as_json: AsJson = False,
) -> None:
    """Serve the models of a spec, or change what is served to it, and wait until they answer.

    A model named by alias is looked up anew each time. It listens on 127.0.0.1 unless the spec or --host says
    otherwise: beyond loopback callers need a key, or the spec says `keys: {required: never}`.

    Example: tandem serve up serve/specs/chat.yaml --set models.stdlib-lm-chat.replicas=2
    """
    import json

    from cluster import specfile
    from serve import endpoints
    from serve.deploy import plan
    from serve.spec import ServeSpec

    changes = [*set_, *([f"http.host={json.dumps(host)}"] if host else [])]
    wanted = plan.absolute(specfile.load(spec, ServeSpec, changes), spec.absolute().parent)
    outcome = endpoints.up(wanted, _say, spec)
    print(json.dumps(outcome, indent=2) if as_json else _welcome(outcome, wanted.http.host))


@app.command()
def status(as_json: AsJson = False) -> None:
    """Show what is served: each model's version, replicas (running of wanted), queue and speed.

    Exit code 1 where something that is meant to be served is not, with what is missing and why.

    Example: tandem serve status
    """
    import json

    from serve import endpoints, served, shortfalls

    found = endpoints.status()
    lost = served.remembered() if found is None else None
    if as_json:
        print(json.dumps({"lost": asdict(lost)} if lost else found, indent=2))
    elif lost is not None:
        print(f"nothing is served; {lost.sentence}")
    elif found is None:
        print("nothing is served; start with `tandem serve up SPEC`")
    else:
        _show(found)
    missing = [] if found is None else shortfalls.found(found)
    for line in missing:
        _say(line)
    if missing or (lost is not None and lost.place != "elsewhere"):
        raise typer.Exit(1)


@app.command()
def chat(
    model: Annotated[str | None, typer.Option("--model", "-m", help="A served model; the first if left out.")] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="The system message.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this one thing, print the answer.")] = None,
    url: Annotated[str | None, typer.Option("--url", help="Another endpoint, such as http://10.0.0.5:8000.")] = None,
) -> None:
    """Talk to a served model in the terminal; from a pipe, each line is a question.

    Example: tandem serve chat --prompt "What does os.walk do?"
    """
    from serve import chat as conversation
    from serve import endpoints

    endpoint, certificate = (url, None) if url else endpoints.reached()
    talk = conversation.connect(endpoint, model, system, certificate)
    if prompt is None:
        conversation.run(talk)
    else:
        talk.ask(prompt)


@app.command()
def down() -> None:
    """Stop the endpoint and every model behind it.

    Example: tandem serve down
    """
    from serve import endpoints

    stopped = endpoints.down(_say)
    print(f"stopped {', '.join(stopped)}" if stopped else "nothing was served")


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _welcome(outcome: dict[str, Any], host: str) -> str:
    """Say where the endpoint is and how to call it."""
    from serve.spec import LOOPBACK

    lines = [f"{name} (version {model['version']})" for name, model in outcome["models"].items()]
    name, model = next(iter(outcome["models"].items()))
    call = f"{outcome['endpoint']}/v2/models/{name}"
    if model["generates"]:
        body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
        call = f"{outcome['endpoint']}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"
    if outcome["keys"]:
        call = f"{call} -H 'authorization: Bearer KEY'"
        lines.append("callers need a key: `tandem serve keys make NAME`")
    elif host not in LOOPBACK:
        lines.append(f"note: {host} is not loopback, and anyone who reaches it may call (keys.required: never)")
    if outcome["certificate"]:
        call = f"--cacert {outcome['certificate']} {call}"
    return "\n".join([f"serving at {outcome['endpoint']}:", *(f"  {line}" for line in lines), f"try: curl {call}"])


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from serve.scaling.decisions import sentence

    table = Table("model", "status", "version", "replicas", "running", "queued", "tok/s", box=None)
    rows = {**found["models"], "(gateway)": found["gateway"]}
    for name, model in rows.items():
        replicas = f"{model['replicas']['running']}/{model['replicas']['target']}"
        live = [model[key] for key in ("running", "queued", "tokens_per_second")]
        version = model["version"] or ""
        table.add_row(name, model["status"].lower(), version, replicas, *("" if v is None else f"{v:g}" for v in live))
    console = Console()
    console.print(f"{found['endpoint']}{'' if found['reachable'] else ' (cannot be reached from here)'}")
    console.print(table)
    for name, model in rows.items():
        if model["warning"]:
            console.print(f"{name}: {model['warning']}", markup=False)
        if model["scaling"]:
            console.print(f"{name}: {sentence(model['scaling'])}", markup=False)
