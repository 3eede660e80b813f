"""Structured output: which tokens may come next so that the text becomes a value of a JSON schema, or a call of a
function, which a grammar describes (llguidance).

A mask costs about 30 microseconds of CPU for each token and a schema about a millisecond once; the vocabulary is
prepared at the first request that wants any of this.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from serve.engines.protocol import RequestError

CACHED_SCHEMAS = 64
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between tokens of JSON: enough for indented output, and bounded, for a model may prefer blanks to an answer."""
FIELDS = {"schema": "response_format", "grammar": "tools"}
"""What a request has to change, by the kind of what it asked for."""
Source = tuple[str, str]
"""`schema` or `grammar`, and its text."""


class Constraint:
    """One text's way through its schema."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._bits = np.zeros(-(-vocab_size // 32), np.int32)

    def forbidden(self) -> np.ndarray:
        """Return [vocab]: which tokens may not come next."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._vocab_size]
        return allowed == 0

    def observe(self, token: int) -> None:
        """Go on by a chosen token."""
        self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return bool(self._matcher.is_stopped())

    @property
    def failure(self) -> str | None:
        """Why the schema cannot be followed any further, where its text is not whole: it became too complex."""
        reason = str(self._matcher.stop_reason()) if self._matcher.is_stopped() else ""
        return reason if reason.endswith(("Error", "TooComplex")) else None


class Grammars:
    """Schemas compiled for one model's vocabulary. Safe to use from several threads."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = eos
        self._vocabulary: Any = None
        self._matchers: OrderedDict[Source, Any] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(self, schema: str | None, grammar: str | None = None) -> Constraint:
        """Return the constraint of a new text: by a JSON schema, or by a grammar in Lark.

        Raises RequestError for one that cannot be followed.
        """
        source: Source = ("schema", schema or "{}") if grammar is None else ("grammar", grammar)
        with self._lock:
            if source not in self._matchers:
                self._matchers[source] = self._compile(source)
            self._matchers.move_to_end(source)
            while len(self._matchers) > CACHED_SCHEMAS:
                self._matchers.popitem(last=False)
            return Constraint(self._matchers[source].deep_copy(), self._vocab_size)

    def _compile(self, source: Source) -> Any:
        from llguidance import LLMatcher

        kind, text = source
        field = FIELDS[kind]
        try:
            if kind == "schema":
                grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})
            else:
                grammar = LLMatcher.grammar_from_lark(text)
        except ValueError as error:
            raise RequestError(field, f"is no JSON schema: {error}") from None
        matcher = LLMatcher(self._prepared_vocabulary(field), grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(field, f"this schema cannot be followed: {_reason(str(matcher.get_error()), text)}")
        first = Constraint(matcher.deep_copy(), self._vocab_size)
        first.forbidden()
        if first.complete and not matcher.is_accepting():  # it could only end: a schema that refers to itself alone
            raise RequestError(field, "this schema cannot be followed: there is no value that it describes")
        return matcher

    def _prepared_vocabulary(self, field: str) -> Any:
        if self._vocabulary is None:
            from llguidance.hf import from_tokenizer

            try:
                self._vocabulary = from_tokenizer(self._tokenizer, self._vocab_size, sorted(self._eos) or None)
            except ValueError as error:
                raise RequestError(field, f"this model's tokenizer cannot be constrained: {error}") from None
        return self._vocabulary


IN_OUR_WORDS = (
    (r"oneOf constraints are not supported.*", "oneOf is followed where its branches cannot overlap; use anyOf"),
    (
        r"Resource '(?:json-schema:///)?([^']*)' is not present.*",
        r"it refers to '\1', and other documents are not fetched",
    ),
    (r"(fuel exhausted|initial lexer config|grammar size|Unable to determine if regex|panic:).*", "it is too complex"),
    (r"Failed to generate regex for \w+ range.*", "its minimum or maximum is beyond what can be followed"),
    (r"Regex is empty: .*", "no text fits it"),
    (r"Expected f64 for", "Expected a number for"),
)
"""What llguidance says of its own insides → what that means for a client."""


def _reason(error: str, text: str) -> str:
    """Return why a schema, or a grammar of calls, cannot be used: a sentence for the client."""
    reason = _told(error, text)
    for said, meant in IN_OUR_WORDS:
        reason = re.sub(said, meant, reason)
    return reason


def _told(error: str, text: str) -> str:
    """Return why llguidance cannot use a schema, or a grammar of calls, without lines of the grammar."""
    first, *rest = error.splitlines()
    told = next((line.removeprefix("error: ") for line in rest if line.startswith("error: ")), "")
    placed = re.match(r"at (\d+)\(\d+\): (?:failed to compile JSON schema: )?(.*)", first)
    if placed is None:
        return f"{first} {told}".rstrip()
    line = text.splitlines()[int(placed[1]) - 1 :][:1]  # of a grammar: a call's rule stands above its arguments'
    number = re.match(r"arguments_(\d+):", "".join(line))
    name = re.search(rf'^call_{number[1]}: .*?name\\": \\"(.*?)\\"', text, re.M) if number else None
    return f"{f'function {name[1]!r}: ' if name else ''}{placed[2]} {told}".rstrip()
