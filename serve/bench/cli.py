"""`tandem serve bench`: its options, and what it prints and writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from serve.bench.settings import Settings

LENGTHS = "64, uniform:16:128, or lognormal:64:0.5[:MOST] (median, sigma)"
Url = Annotated[str | None, typer.Option(help="The endpoint; the one that was brought up from here if left out.")]
Remote = Annotated[bool, typer.Option("--allow-remote", help="Let --url be another machine than this one.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="The first that generates text if left out.")]
Route = Annotated[str, typer.Option(help="chat or completions.")]
Users = Annotated[int | None, typer.Option(min=1, max=100_000, help="Closed loop: so many wait for their answers.")]
Rate = Annotated[float | None, typer.Option(min=1e-3, max=1e6, help="Open loop: so many requests arrive a second.")]
Burstiness = Annotated[
    float, typer.Option(min=1e-2, help="Shape of the gaps' gamma distribution: 1 is Poisson, less bursty, inf a clock.")
]
Requests = Annotated[int, typer.Option(min=1, max=10_000_000, help="At most so many.")]
Seconds = Annotated[float, typer.Option(min=0.1, max=86_400, help="None begins later than this.")]
Warmup = Annotated[int, typer.Option(min=0, max=10_000, help="So many come first, one by one, and count for nothing.")]
Ramp = Annotated[float, typer.Option("--ramp", min=0, max=3_600, help="Users begin over so many seconds.")]
Think = Annotated[
    float, typer.Option("--think", min=0, max=3_600, help="A user waits so many seconds after an answer.")
]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, max=86_400, help="Seconds for one answer.")]
Drain = Annotated[float, typer.Option("--drain", min=0, max=86_400, help="Seconds for what still runs at the end.")]
Prompt = Annotated[str, typer.Option("--prompt-tokens", help=f"Lengths of prompts: {LENGTHS}.")]
Answer = Annotated[str, typer.Option("--answer-tokens", help=f"Lengths of answers: {LENGTHS}.")]
File = Annotated[
    Path | None,
    typer.Option(
        help="JSON lines with prompt, messages or prompt_tokens, and max_tokens; in their order, again and again."
    ),
]
Prefixes = Annotated[int, typer.Option(min=0, max=100_000, help="Each prompt begins with one of so many prefixes.")]
PrefixTokens = Annotated[int, typer.Option(min=0, max=1_000_000, help="Tokens of a prefix, beside --prompt-tokens.")]
Sessions = Annotated[int, typer.Option(min=0, max=1_000_000, help="Prompts are turns of so many conversations.")]
Turns = Annotated[int, typer.Option(min=1, max=1_000, help="Turns of a conversation, each with those before it.")]
TokenIds = Annotated[
    str | None, typer.Option(help="Prompts of token ids FIRST:END instead of words: exact lengths, completions only.")
]
Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--key", help="A caller's key; may be repeated. Others on this machine can see it: --keys-file hides it."
    ),
]
KeysFile = Annotated[Path | None, typer.Option(help="Callers, a line each: NAME KEY [SHARE of the load].")]
Slo = Annotated[str | None, typer.Option(help="Bounds for goodput: ttft=500ms,tpot=50ms,e2e=10s.")]
Stream = Annotated[bool, typer.Option("--stream/--no-stream", help="Ask for streams.")]
IgnoreEos = Annotated[
    bool,
    typer.Option("--ignore-eos/--no-ignore-eos", help="Ask for answers of full length (no parameter of OpenAI's)."),
]
Temperature = Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")]
Seed = Annotated[int, typer.Option(help="Of lengths, prompts and arrivals.")]
Processes = Annotated[int, typer.Option(min=1, max=256, help="Send from so many processes.")]
MaxOpen = Annotated[
    int, typer.Option(min=1, max=100_000, help="Open loop: requests in flight; more wait in the client.")
]
CaCert = Annotated[Path | None, typer.Option("--cacert", help="For https: trust these certificates, no others.")]
Out = Annotated[
    Path | None, typer.Option(help="Write FILE.json and FILE.svg; bench-DATE-TIME here if left out.", metavar="FILE")
]
Plot = Annotated[bool, typer.Option("--plot/--no-plot", help="Write the picture too.")]
EachRequest = Annotated[bool, typer.Option("--each-request", help="Put every request into the JSON.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]

SAME = (
    *("users", "rate", "burstiness", "requests", "seconds", "warmup", "prefixes", "prefix_tokens", "sessions", "turns"),
    *("stream", "ignore_eos", "temperature", "seed", "processes", "max_open"),
)
"""Options that are settings as they are given."""


def bench(
    url: Url = None,
    allow_remote: Remote = False,
    model: Model = None,
    route: Route = "chat",
    users: Users = None,
    rate: Rate = None,
    burstiness: Burstiness = 1.0,
    requests: Requests = 1_000,
    seconds: Seconds = 60.0,
    warmup: Warmup = 4,
    ramp: Ramp = 0.0,
    think: Think = 0.0,
    timeout: Timeout = 300.0,
    drain: Drain = 30.0,
    prompt_tokens: Prompt = "64",
    answer_tokens: Answer = "64",
    file: File = None,
    prefixes: Prefixes = 0,
    prefix_tokens: PrefixTokens = 0,
    sessions: Sessions = 0,
    turns: Turns = 4,
    token_ids: TokenIds = None,
    key: Keys = None,
    keys_file: KeysFile = None,
    slo: Slo = None,
    stream: Stream = True,
    ignore_eos: IgnoreEos = True,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    processes: Processes = 1,
    max_open: MaxOpen = 1_024,
    cacert: CaCert = None,
    out: Out = None,
    plot: Plot = True,
    each_request: EachRequest = False,
    as_json: AsJson = False,
) -> None:
    """Send load to an endpoint and print latencies, rates and errors; writes a JSON and a plot.

    Without --users and --rate, 8 users. Ends after --requests or --seconds, whichever comes first. A key may also come
    from TANDEM_API_KEY.

    Example: tandem serve bench --users 32 --prompt-tokens lognormal:64:0.5 --slo ttft=500ms,tpot=50ms
    """
    _bench(dict(locals()))


def _bench(given: dict[str, Any]) -> None:
    """Do what the options say."""
    import json

    from serve.bench import report

    settings, out = _settings(given), given["out"]
    result = report.run(settings, say=lambda line: typer.echo(line, err=True), each_request=given["each_request"])
    written = report.write(result, out, given["plot"])
    if given["as_json"]:
        print(json.dumps(result.told, indent=2))
    else:
        report.show(result)
    typer.echo(f"written: {', '.join(map(str, written))}", err=True)


def _settings(given: dict[str, Any]) -> Settings:
    """Return the options as settings. Raises UserError."""
    import os

    from cluster.errors import UserError
    from serve.bench import lengths, settings

    routes: dict[str, Literal["chat", "completions"]] = {"chat": "chat", "completions": "completions"}
    if given["route"] not in routes:
        raise UserError(f"--route: {given['route']!r} is none; there are chat and completions")
    if given["users"] is None and given["rate"] is None:
        given = {**given, "users": max(8, given["processes"])}
    url, certificate = (given["url"], None) if given["url"] else _own_endpoint()
    return settings.check(
        settings.Settings(
            target=settings.target(url, given["allow_remote"]),
            model=given["model"] or "",
            route=routes[given["route"]],
            prompt_tokens=lengths.parse(given["prompt_tokens"], "--prompt-tokens"),
            answer_tokens=lengths.parse(given["answer_tokens"], "--answer-tokens"),
            callers=settings.callers(given["key"] or [], given["keys_file"], os.environ.get("TANDEM_API_KEY")),
            **{name: given[name] for name in SAME},
            **{f"{name}_s": given[name] for name in ("ramp", "think", "timeout", "drain")},
            file=str(given["file"]) if given["file"] else None,
            token_ids=settings.token_ids(given["token_ids"]),
            slo=settings.slo(given["slo"]),
            cacert=str(given["cacert"]) if given["cacert"] else None,
            certificate=certificate,
        )
    )


def _own_endpoint() -> tuple[str, str | None]:
    """Return the address of the endpoint that was brought up from here, and the file of its own certificate."""
    from serve import endpoints

    return endpoints.reached()
