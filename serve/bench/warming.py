"""What comes before the measured requests and is not counted: which model, its tokens a word, a first few answers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.errors import UserError
from serve.bench import drive, record
from serve.bench.drive import Part
from serve.bench.http import Client, Lost
from serve.bench.settings import Settings
from serve.bench.workload import PATHS, WordRate, Workload, measured

FEW, MANY = 8, 40
"""Words of the two prompts whose tokens are compared."""
LIST_S = 30.0


@dataclass
class Warm:
    """What was found out."""

    model: str
    rate: WordRate
    server: dict[str, Any]
    requests: int = 0
    said: list[str] = field(default_factory=list)


async def warm(settings: Settings) -> Warm:
    """Find the model, learn its tokens a word where prompts are words, and send `warmup` requests one by one.

    Raises:
        UserError: nothing answers, or no request of the warm-up succeeds.
    """
    try:
        client = Client(settings.target, settings.cacert, settings.certificate)
        key = settings.callers[0].key
    except OSError as error:
        raise UserError(f"--cacert: {settings.cacert} cannot be read as certificates: {error}") from None
    try:
        model, server = await asyncio.wait_for(_model(client, settings, key), LIST_S)
        found = Warm(model, WordRate(), server)
        settings = replace(settings, model=model)
        if not settings.token_ids and not settings.file:
            await _learn(client, settings, key, found)
    except (OSError, Lost, asyncio.TimeoutError) as error:
        why = str(error) or "no answer in time"
        raise UserError(f"{settings.target.url} does not answer: {why}; see `tandem serve status`") from None
    finally:
        client.close()
    if settings.warmup:
        await _send(settings, found)
    return found


async def _model(client: Client, settings: Settings, key: str | None) -> tuple[str, dict[str, Any]]:
    """Return the model's name, and what the server says of itself and of it."""
    status, headers, answer = await client.get("/v1/models", key)
    if status != 200 or not isinstance(answer, dict):
        said = answer if isinstance(answer, str) else (answer or {}).get("error", answer)
        raise UserError(f"{settings.target.url}/v1/models answers {status}: {said}")
    cards = [card for card in answer.get("data", []) if card.get("generates", True)]
    names = [card["id"] for card in cards]
    if not names or (settings.model and settings.model not in names):
        wanted = f"no model {settings.model!r}" if settings.model else "no model that generates text"
        raise UserError(f"{settings.target.url} has {wanted} for this key; there are: {', '.join(names) or 'none'}")
    name = settings.model or names[0]
    return name, {"server": headers.get("server"), "card": cards[names.index(name)]}


async def _learn(client: Client, settings: Settings, key: str | None, found: Warm) -> None:
    """Ask for two prompts' usage."""
    counted = []
    for words in (FEW, MANY):
        status, _, answer = await client.post(PATHS[settings.route], Workload(settings).probe(words), key)
        usage = answer.get("usage") if isinstance(answer, dict) else None
        if status != 200 or not usage or not isinstance(usage.get("prompt_tokens"), int):
            found.said.append(f"prompts are taken to have a token a word: a request for their usage got {status}")
            return
        counted.append((words, int(usage["prompt_tokens"])))
    found.rate = measured(*counted)
    found.said.append(
        f"prompts are words of {found.rate.per_word:.2f} tokens, and {found.rate.beside:.0f} tokens beside them"
    )


async def _send(settings: Settings, found: Warm) -> None:
    own = replace(
        settings, users=1, rate=None, callers=settings.callers[:1], requests=settings.warmup, slo=(), burstiness=1.0
    )
    own = replace(own, seconds=settings.timeout_s, seed=settings.seed + 1_000_003, processes=1)
    part = await drive.run(Part(own, begin_at=time.monotonic()), Workload(own, found.rate))
    found.requests = len(part.records)
    failed = [each for each in part.records if each.outcome != record.OK]
    found.said.append(f"warm-up: {found.requests} requests, {len(failed)} of them not whole; they are in no figure")
    if failed and len(failed) == len(part.records):
        raise UserError(f"no request of the warm-up succeeded: {failed[0].outcome}: {failed[0].detail}")
