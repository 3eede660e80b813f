"""Fifty streams at once, and what comes of each.

python -m tests.support.fifty_streams URL FILE      # on a host: FILE is made once all of them stream; then JSON
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

STREAMS = 50
TOKENS = 450


@dataclass
class Text:
    """One stream: what came of it, and when."""

    body: dict[str, Any]
    text: str = ""
    chunks: int = 0
    ended: bool = False
    error: str | None = None
    version: str = ""
    arrived: list[float] = field(default_factory=list)

    @property
    def longest_gap_s(self) -> float:
        return max((b - a for a, b in zip(self.arrived, self.arrived[1:], strict=False)), default=0.0)


def requests() -> list[dict[str, Any]]:
    """Return the bodies: half of them greedy, half of them seeded, some with a stop string that never comes."""
    bodies = []
    for number in range(STREAMS):
        chosen = {"temperature": 0} if number % 2 else {"temperature": 1, "seed": number, "top_p": 0.9}
        common = {"model": "tiny", "prompt": f"number {number}", "max_tokens": TOKENS, "ignore_eos": True}
        bodies.append({**common, **chosen, **({"stop": "\0never"} if number % 5 == 0 else {}), "stream": True})
    return bodies


async def filled(client: httpx.AsyncClient, text: Text) -> Text:
    try:
        async with client.stream("POST", "/v1/completions", json=text.body) as answer:
            text.version = answer.headers.get("x-tandem-model-version", "")
            if answer.status_code != 200:
                text.error = f"{answer.status_code} {(await answer.aread()).decode()}"
                return text
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    text.ended = True
                elif line.startswith("data: "):
                    _add(text, json.loads(line.removeprefix("data: ")))
    except httpx.HTTPError as error:
        text.error = repr(error)
    return text


def _add(text: Text, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        text.error = str(chunk["error"])
        return
    text.text += chunk["choices"][0]["text"]
    text.chunks += 1
    text.arrived.append(time.monotonic())


def streams(endpoint: str, fault: Callable[[], None] | None = None) -> list[Text]:
    """Run all streams together; in the middle of them, the fault."""

    async def run() -> list[Text]:
        async with client(endpoint) as http:
            texts = [Text(body) for body in requests()]
            tasks = [asyncio.create_task(filled(http, text)) for text in texts]
            if fault is not None:
                while not all(text.chunks for text in texts):
                    assert not any(text.ended or text.error for text in texts), "too late for a fault"
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(fault)
                assert not any(text.ended for text in texts), "the fault came after a stream's end"
            return list(await asyncio.gather(*tasks))

    return asyncio.run(run())


def client(endpoint: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=endpoint, timeout=120, limits=httpx.Limits(max_connections=None))


def wrong(texts: Sequence[Text], undisturbed: Sequence[Text]) -> list[str]:
    """Return what is not as it would be without a fault."""
    found = []
    for text, before in zip(texts, undisturbed, strict=True):
        if text.error or not text.ended:
            found.append(f"{text.body['prompt']}: {text.error or 'cut'}")
        elif text.text != before.text:
            at = next(n for n, (a, b) in enumerate(zip(text.text + "\0", before.text + "\1", strict=False)) if a != b)
            found.append(f"{text.body['prompt']}: differs at character {at} of {len(before.text)}")
    return found


def main(url: str, streaming: Path) -> None:
    """Run all streams; print what came of them."""
    json.dump([asdict(text) for text in streams(url, streaming.touch)], sys.stdout)


def read(printed: str) -> list[Text]:
    """Return what `main` has printed."""
    return [Text(**each) for each in json.loads(printed)]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
