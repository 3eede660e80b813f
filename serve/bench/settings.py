"""All settings of one run, read from the options and checked."""

from __future__ import annotations

import ipaddress
import re
import socket
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.errors import UserError
from serve.bench.lengths import Length

MOST_REQUESTS, MOST_SECONDS = 10_000_000, 86_400.0
SLO_NAMES = ("ttft", "tpot", "e2e")
UNITS_S = {"ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Target:
    """Where requests go."""

    host: str
    port: int
    prefix: str
    """What stands before `/v1` in the path."""
    tls: bool

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"


@dataclass(frozen=True)
class Caller:
    """Who calls: a key and its share of the load."""

    name: str
    """What results call it."""
    key: str | None
    """The secret; results never have it."""
    share: float = 1.0


@dataclass(frozen=True)
class Settings:
    """One run of the load generator."""

    target: Target
    model: str
    route: Literal["chat", "completions"]
    users: int | None
    """Of the closed loop: each sends its next request when it has the answer. None: the open loop."""
    rate: float | None
    """Of the open loop: requests a second, whether answers come or not."""
    prompt_tokens: Length
    answer_tokens: Length
    callers: tuple[Caller, ...] = (Caller("anyone", None),)
    burstiness: float = 1.0
    requests: int = 1_000
    seconds: float = 60.0
    warmup: int = 4
    ramp_s: float = 0.0
    """Over how long the closed loop's users begin."""
    think_s: float = 0.0
    """How long a user of the closed loop waits after an answer."""
    timeout_s: float = 300.0
    drain_s: float = 30.0
    """How long requests that run at the end are waited for."""
    file: str | None = None
    prefixes: int = 0
    prefix_tokens: int = 0
    sessions: int = 0
    turns: int = 4
    token_ids: tuple[int, int] | None = None
    """Prompts of token ids in this range, the end not included, instead of words."""
    stream: bool = True
    ignore_eos: bool = True
    temperature: float | None = 0.0
    seed: int = 0
    slo: tuple[tuple[str, float], ...] = ()
    """Bounds in seconds, by name."""
    processes: int = 1
    max_open: int = 1_024
    """Requests of the open loop in flight; more wait in the client, which is counted."""
    cacert: str | None = None
    """Certificates that sign the server's; None: those that the machine trusts."""
    certificate: str | None = None
    """The server's very own, trusted under whatever name it is reached: an endpoint's that was brought up from here."""

    def told(self) -> dict[str, Any]:
        """Return the settings for the results, without secrets."""
        own = {name: value for name, value in vars(self).items() if name not in ("target", "callers", "slo")}
        lengths = {name: str(own[name]) for name in ("prompt_tokens", "answer_tokens")}
        callers = [{"name": caller.name, "share": caller.share} for caller in self.callers]
        return {"url": self.target.url, **own, **lengths, "callers": callers, "slo_s": dict(self.slo)}


def target(url: str, allow_remote: bool) -> Target:
    """Read where to send requests; an address of this machine unless `allow_remote`. Raises UserError."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UserError(f"--url: {url!r} is no address: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError(f"--url: {url!r} is no address of an endpoint; write it as http://127.0.0.1:8000")
    if parts.username is not None:
        raise UserError("--url: it has a user's name or a password in it; give keys by --keys-file")
    if not allow_remote and not is_own(parts.hostname):
        raise UserError(
            f"--url: {parts.hostname} is not this machine, and load on a machine of others may be an attack; "
            "with --allow-remote it is sent all the same"
        )
    path = parts.path.rstrip("/").removesuffix("/v1")
    return Target(parts.hostname, port or (443 if parts.scheme == "https" else 80), path, parts.scheme == "https")


def is_own(host: str) -> bool:
    """Say whether a host is this machine: `localhost` or one of its addresses. No other name is looked up."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    if address.is_loopback or address.is_unspecified:
        return address.is_loopback
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as asks:
            asks.connect((host, 9))  # sends nothing: what would go to an own address would come from it too
            return ipaddress.ip_address(asks.getsockname()[0]) == address
    except OSError:
        return False


def slo(text: str | None) -> tuple[tuple[str, float], ...]:
    """Read `ttft=500ms,tpot=50ms` as bounds in seconds. Raises UserError."""
    bounds: list[tuple[str, float]] = []
    for part in (text or "").split(",") if text else ():
        match = re.fullmatch(r"\s*(\w+)=([0-9.]+)(ms|s)\s*", part)
        if not match or match[1] not in SLO_NAMES or match[2].count(".") > 1 or match[2] == ".":
            known = ", ".join(SLO_NAMES)
            raise UserError(f"--slo: {part!r} is no bound; write ttft=500ms,tpot=50ms (there are {known}; ms or s)")
        if match[1] in dict(bounds):
            raise UserError(f"--slo: {match[1]} is given twice")
        bounds.append((match[1], float(match[2]) * UNITS_S[match[3]]))
    return tuple(bounds)


def token_ids(text: str | None) -> tuple[int, int] | None:
    """Read `256:8192` as a range of token ids. Raises UserError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"--token-ids: {text!r} is no range; write the first and the one after the last, 256:8192")
    return int(match[1]), int(match[2])


def callers(keys: list[str], file: Path | None, from_environment: str | None) -> tuple[Caller, ...]:
    """Return who calls: each `--key` and each line of the file, `NAME KEY [SHARE]`; else the environment's key.

    Raises:
        UserError: a line that is none, or a name that is there twice.
    """
    found = [Caller(f"key-{number}", key) for number, key in enumerate(keys, 1)]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--keys-file: {file} cannot be read: {error}") from None
        found += [_caller(file, at, line) for at, line in enumerate(lines, 1) if line.strip()]
        if not found:
            raise UserError(f"--keys-file: {file} has no keys; write a line `NAME KEY [SHARE]` for each")
    names = [caller.name for caller in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--keys-file: {', '.join(twice)} is there twice; each key needs a name of its own")
    for caller in found:
        if caller.key is not None and not re.fullmatch(r"[\x21-\x7e]+", caller.key):
            raise UserError(f"the key of {caller.name} has characters that no header may have")
    return tuple(found) or (Caller("anyone" if from_environment is None else "key-1", from_environment),)


def _caller(file: Path, at: int, line: str) -> Caller:
    parts = line.split()
    if len(parts) in (2, 3) and (len(parts) == 2 or re.fullmatch(r"\d+(\.\d+)?", parts[2])):
        share = float(parts[2]) if len(parts) == 3 else 1.0
        if share > 0:
            return Caller(parts[0], parts[1], share)
    raise UserError(f"--keys-file: {file}:{at} is no `NAME KEY [SHARE]` with a share above 0")


def check(settings: Settings) -> Settings:
    """Return the settings, or raise UserError for the first that does not go with the others."""
    closed_only = {"--ramp": settings.ramp_s, "--think": settings.think_s}
    wrong = [
        ("--users and --rate are two kinds of load: name one", (settings.users is None) == (settings.rate is None)),
        ("--burstiness is of the open loop: name --rate", settings.rate is None and settings.burstiness != 1.0),
        *(
            (f"{name} is of the closed loop: name --users", settings.rate and given)
            for name, given in closed_only.items()
        ),
        ("--token-ids needs --route completions: chat takes text", settings.token_ids and settings.route == "chat"),
        ("--prefixes and --prefix-tokens need each other", bool(settings.prefixes) != bool(settings.prefix_tokens)),
        ("--sessions does nothing beside --file", settings.sessions and settings.file),
        ("--prefixes does nothing beside --file", settings.prefixes and settings.file),
        (
            f"--users {settings.users} are fewer than the {len(settings.callers)} keys, so some would send nothing",
            settings.users is not None and settings.users < len(settings.callers),
        ),
        (
            f"--processes {settings.processes} are more than --users {settings.users}",
            settings.users is not None and settings.users < settings.processes,
        ),
        ("--slo: without --stream there is no ttft or tpot", not settings.stream and _needs_stream(settings)),
    ]
    for sentence, is_wrong in wrong:
        if is_wrong:
            raise UserError(sentence)
    return settings


def _needs_stream(settings: Settings) -> bool:
    return any(name != "e2e" for name, _ in settings.slo)
