"""What each request asks: prompts of a wished length, shared prefixes, conversations, or the rows of a file."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from serve.bench.settings import Settings

COMMON = (
    "the of and to in is that it for was on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over "
    "did down only way find use may water long little very after words called just where most know"
)
WORDS = COMMON.split()
"""Words that tokenizers have whole."""
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@dataclass(frozen=True)
class WordRate:
    """How many tokens the model's tokenizer makes of words."""

    per_word: float = 1.0
    beside: float = 0.0
    """Tokens of a prompt without words: what the chat template adds."""

    def words(self, tokens: int) -> int:
        """Return how many words come nearest to so many tokens of prompt; at least one."""
        return max(1, round((tokens - self.beside) / self.per_word))


def measured(few: tuple[int, int], many: tuple[int, int]) -> WordRate:
    """Return the rate from two prompts, each (words, tokens)."""
    per_word = (many[1] - few[1]) / (many[0] - few[0])
    if per_word <= 0:
        return WordRate()
    return WordRate(per_word, few[1] - few[0] * per_word)


@dataclass(frozen=True)
class Asked:
    """One request's body and what it is meant to be."""

    body: bytes
    prompt_tokens: int | None
    """As it was wished; None of a file's own text."""
    answer_tokens: int
    session: str | None


class Workload:
    """All requests of a run: the same number has the same request, in whichever process."""

    def __init__(self, settings: Settings, rate: WordRate = WordRate()) -> None:
        self._settings, self._rate = settings, rate
        self._rows = _read(Path(settings.file), settings) if settings.file else []
        seeds = (random.Random(f"prefix {settings.seed} {number}") for number in range(settings.prefixes))
        self._prefixes = [self._some(chance, settings.prefix_tokens) for chance in seeds]

    def request(self, number: int) -> Asked:
        """Return the request with this number."""
        settings, chance = self._settings, random.Random(f"request {self._settings.seed} {number}")
        row = self._rows[number % len(self._rows)] if self._rows else {}
        prompt_tokens = row.get("prompt_tokens") or settings.prompt_tokens.draw(chance)
        answer_tokens = row.get("max_tokens") or settings.answer_tokens.draw(chance)
        session = None
        if "messages" in row or "prompt" in row:
            prompt, prompt_tokens = row.get("messages", row.get("prompt")), None
        elif settings.sessions:
            session, prompt, prompt_tokens = self._of_session(number)
        else:
            prompt = self._text(self._parts(chance, prompt_tokens))
            prompt_tokens += settings.prefix_tokens
        return Asked(self.body(prompt, answer_tokens), prompt_tokens, answer_tokens, session)

    def body(self, prompt: Any, answer_tokens: int, stream: bool | None = None) -> bytes:
        """Return a body as JSON; `prompt` is text, token ids or messages."""
        settings = self._settings
        streams = settings.stream if stream is None else stream
        chat = {"messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
        asked: dict[str, Any] = {"model": settings.model, "max_tokens": answer_tokens}
        asked |= chat if settings.route == "chat" else {"prompt": prompt}
        if streams:
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
        if settings.ignore_eos:
            asked["ignore_eos"] = True
        if settings.temperature is not None:
            asked["temperature"] = settings.temperature
        return json.dumps(asked, separators=(",", ":")).encode()

    def probe(self, words: int) -> bytes:
        """Return a request of so many words, whose usage tells how many tokens they are."""
        return self.body(" ".join(random.Random(f"probe {words}").choices(WORDS, k=words)), 1, stream=False)

    def _parts(self, chance: random.Random, tokens: int) -> list[list[Any]]:
        prefix = self._prefixes[chance.randrange(len(self._prefixes))] if self._prefixes else []
        beside = self._rate.beside if prefix else 0  # the template's tokens are there once
        return [prefix, self._some(chance, max(1, tokens + round(beside)))]

    def _of_session(self, number: int) -> tuple[str, Any, int]:
        """Return a conversation's name, its prompt (its earlier turns again, and one more) and the prompt's tokens."""
        settings = self._settings
        turn, session = divmod(number, settings.sessions)
        talk, turn = divmod(turn, settings.turns)
        name = f"bench-{settings.seed}-{session}-{talk}"
        parts = [list(self._prefixes[session % len(self._prefixes)])] if self._prefixes else []
        tokens = settings.prefix_tokens
        for earlier in range(turn + 1):
            chance = random.Random(f"turn {name} {earlier}")
            drawn = settings.prompt_tokens.draw(chance)
            tokens += drawn
            parts.append(self._some(chance, drawn + (round(self._rate.beside) if parts else 0)))  # they are there once
        return name, self._text(parts), tokens

    def _some(self, chance: random.Random, tokens: int) -> list[Any]:
        """Return so many token ids, or words that make so many tokens."""
        if self._settings.token_ids:
            low, high = self._settings.token_ids
            return [chance.randrange(low, high) for _ in range(tokens)]
        return chance.choices(WORDS, k=self._rate.words(tokens))

    def _text(self, parts: list[list[Any]]) -> Any:
        whole = [each for part in parts for each in part]
        return whole if self._settings.token_ids else " ".join(whole)


def _read(path: Path, settings: Settings) -> list[dict[str, Any]]:
    """Read the rows of a file. Raises UserError with the line at fault."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file: {path} cannot be read: {error}") from None
    rows = [_row(f"--file: {path}:{at}", line, settings) for at, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"--file: {path} has no rows")
    return rows


def _row(place: str, line: str, settings: Settings) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{place} is no object")
    if unknown := sorted(row.keys() - {"prompt", "messages", "prompt_tokens", "max_tokens"}):
        raise UserError(f"{place}: {', '.join(unknown)} is not known; rows have a prompt, messages or prompt_tokens, "
                        "and max_tokens")  # fmt: skip
    if len(row.keys() & {"prompt", "messages", "prompt_tokens"}) > 1:
        raise UserError(f"{place} has more than one of prompt, messages and prompt_tokens")
    for name in row.keys() & {"prompt_tokens", "max_tokens"}:
        if type(row[name]) is not int or not 1 <= row[name] <= 10_000_000:
            raise UserError(f"{place}: {name} is {row[name]!r}, no whole number of tokens")
    _check_prompt(place, row, settings.route)
    return row


def _check_prompt(place: str, row: dict[str, Any], route: str) -> None:
    prompt, messages = row.get("prompt"), row.get("messages")
    if messages is not None and (route != "chat" or not isinstance(messages, list) or not messages):
        raise UserError(f"{place}: messages are a list, and need --route chat")
    if prompt is None:
        return
    is_ids = isinstance(prompt, list) and bool(prompt) and all(type(each) is int for each in prompt)
    if not isinstance(prompt, str) and not (is_ids and route == "completions"):
        raise UserError(f"{place}: a prompt is a text, or with --route completions a list of token ids")
