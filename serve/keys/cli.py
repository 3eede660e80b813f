"""`tandem serve keys …` and `tandem serve usage`: who may call the endpoint, how much, and what each has used."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from serve.keys.limits import Limits
    from serve.keys.store import Key, Store

app = typer.Typer(
    no_args_is_help=True,
    help="API keys of the endpoint: made, listed, limited, rotated and revoked while it runs.",
)

Name = Annotated[str, typer.Argument(help="The key's name: usage is counted by it.", metavar="NAME")]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        envvar="TANDEM_KEYS_STORE",
        help="postgresql://USER@HOST/DATABASE, as the serve spec's `keys.store`; a file in Tandem's home if left out. "
        "The password comes from ~/.pgpass or PGPASSWORD.",
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="NAME", help="A model it may call; may be repeated. Any if left out."),
]
PerMinute = Annotated[int | None, typer.Option(help="Requests that may begin within a minute.")]
TokensPerMinute = Annotated[int | None, typer.Option(help="Tokens of prompts and answers within a minute.")]
Concurrency = Annotated[int | None, typer.Option(help="Texts in flight at the same time: `n` for each prompt.")]
PerDay = Annotated[int | None, typer.Option(help="Budget of tokens a day (UTC).")]
PerMonth = Annotated[int | None, typer.Option(help="Budget of tokens a calendar month (UTC).")]
Priority = Annotated[str | None, typer.Option(help="high, normal or low: who is served first when requests wait.")]
Operator = Annotated[
    bool, typer.Option("--operator", help="It reads /status and /metrics of all models, and calls none.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


@app.command()
def make(
    name: Name,
    model: Models = None,
    requests_per_minute: PerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrency: Concurrency = None,
    tokens_per_day: PerDay = None,
    tokens_per_month: PerMonth = None,
    priority: Priority = None,
    operator: Operator = False,
    store: StoreUrl = None,
) -> None:
    """Make a key and print it, once: only its digest is kept.

    Example: tandem serve keys make alice --requests-per-minute 60 --tokens-per-day 200000
    """
    limits = _limits(
        models=model,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrency=concurrency,
        tokens_per_day=tokens_per_day,
        tokens_per_month=tokens_per_month,
        priority=priority,
        operator=operator or None,
    )
    _show_once(_open(store).create(name, limits).text)


@app.command("list")
def list_(store: StoreUrl = None, as_json: AsJson = False) -> None:
    """List the keys with their limits; secrets are not kept, so they cannot be shown.

    Example: tandem serve keys list
    """
    import json

    found = _open(store).all()
    if as_json:
        print(json.dumps([_as_json(key) for key in found], indent=2))
    elif not found:
        print("there are no keys; make one with `tandem serve keys make NAME`")
    else:
        _print_table(["key", "secrets", "limits", "made", "state"], [_row(key) for key in found])


@app.command()
def limit(
    name: Name,
    model: Models = None,
    requests_per_minute: PerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrency: Concurrency = None,
    tokens_per_day: PerDay = None,
    tokens_per_month: PerMonth = None,
    priority: Priority = None,
    operator: Operator = False,
    store: StoreUrl = None,
) -> None:
    """Replace a key's limits: what is not named has none afterwards. It acts within seconds, in running gateways too.

    Example: tandem serve keys limit alice --concurrency 4 --priority low
    """
    limits = _limits(
        models=model,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrency=concurrency,
        tokens_per_day=tokens_per_day,
        tokens_per_month=tokens_per_month,
        priority=priority,
        operator=operator or None,
    )
    _open(store).limit(name, limits)
    print(f"{name}: {_said(limits)}")


@app.command()
def rotate(
    name: Name,
    grace_s: Annotated[
        float, typer.Option("--grace-s", min=0, help="How long what it had before stays valid, in seconds.")
    ] = 86_400,
    store: StoreUrl = None,
) -> None:
    """Make a new secret for a key and print it, once; the old one is valid for a while, so that nothing stops.

    Example: tandem serve keys rotate alice --grace-s 3600
    """
    _show_once(_open(store).rotate(name, grace_s).text)
    typer.echo(f"what {name} had before is valid for {grace_s:,.0f} s more", err=True)


@app.command()
def revoke(name: Name, store: StoreUrl = None) -> None:
    """End a key for good; its usage stays. Running gateways refuse it within seconds.

    Example: tandem serve keys revoke alice
    """
    _open(store).revoke(name)
    print(f"{name} is revoked")


def usage(
    key: Annotated[str | None, typer.Option("--key", metavar="NAME", help="Of this key alone.")] = None,
    since: Annotated[str | None, typer.Option(metavar="DAY", help="From this day on, as 2026-01-31 (UTC).")] = None,
    until: Annotated[str | None, typer.Option(metavar="DAY", help="Up to this day, that day included.")] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Show what each key has used, by model and day: requests, tokens of prompts, generated tokens.

    Running gateways write it every second.

    Example: tandem serve usage --since 2026-01-01 --key alice
    """
    import json

    found = _open(store).usage(key, _day(since), _day(until))
    if as_json:
        print(json.dumps([{**vars(used), "day": used.day.isoformat()} for used in found], indent=2))
        return
    if not found:
        print("nothing was used")
        return
    rows = [
        [
            used.key,
            used.model,
            str(used.day),
            *(f"{n:,}" for n in (used.requests, used.prompt_tokens, used.generated_tokens)),
        ]
        for used in found
    ]
    _print_table(["key", "model", "day (UTC)", "requests", "prompt tokens", "generated tokens"], rows)


# -- shown -----------------------------------------------------------------------------------------------------------


def _open(url: str | None) -> Store:
    from serve.keys.store import Store

    return Store(url)


def _limits(**given: Any) -> Limits:
    """Return the limits of the options. Raises UserError naming the option at fault."""
    from pydantic import ValidationError

    from cluster.errors import UserError
    from serve.keys.limits import Limits

    try:
        return Limits(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        wrong = [
            f"--{str(each['loc'][0]).replace('_', '-').replace('models', 'model')}: "
            + each["msg"].removeprefix("Value error, ")
            for each in error.errors()
        ]
        raise UserError("; ".join(wrong)) from None


def _day(text: str | None) -> date | None:
    from cluster.errors import UserError

    if text is None:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise UserError(f"{text!r} is not a day: write it as 2026-01-31") from None


def _show_once(text: str) -> None:
    print(text)
    typer.echo("keep it now: only its digest is stored, and it is not shown again", err=True)


def _said(limits: Limits) -> str:
    if limits.operator:
        return "operator"
    given = limits.model_dump(exclude_none=True, exclude_defaults=True)
    parts = [
        f"{name.replace('_', ' ')} {', '.join(v) if isinstance(v, tuple) else f'{v:,}' if isinstance(v, int) else v}"
        for name, v in given.items()
    ]
    return "; ".join(parts) or "no limits"


def _row(key: Key) -> list[str]:
    import time

    now = time.time()
    live = [each.id for each in key.secrets if each.is_valid(now)]
    made = time.strftime("%Y-%m-%d %H:%M", time.gmtime(key.created))
    return [key.name, ", ".join(live), _said(key.limits), made, "revoked" if key.revoked else "valid"]


def _as_json(key: Key) -> dict[str, Any]:
    held = [{"id": each.id, "created": each.created, "expires": each.expires} for each in key.secrets]
    limits = key.limits.model_dump(exclude_none=True)
    return {"name": key.name, "limits": limits, "created": key.created, "revoked": key.revoked, "secrets": held}


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings, box=box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
