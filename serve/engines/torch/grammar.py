"""Structured output: which tokens may come next so that the text becomes a value of a JSON schema (llguidance).

A mask costs about 30 microseconds of CPU for each token and a schema about a millisecond once; the vocabulary is
prepared at the first request that wants any of this.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from serve.engines.protocol import RequestError

CACHED_SCHEMAS = 64
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between tokens of JSON: enough for indented output, and bounded, for a model may prefer blanks to an answer."""
FIELD = "response_format"


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


class Grammars:
    """Schemas compiled for one model's vocabulary. Safe to use from several threads."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = eos
        self._vocabulary: Any = None
        self._matchers: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(self, schema: str) -> Constraint:
        """Return the constraint of a new text. Raises RequestError for a schema that cannot be followed."""
        with self._lock:
            if schema not in self._matchers:
                self._matchers[schema] = self._compile(schema)
            self._matchers.move_to_end(schema)
            while len(self._matchers) > CACHED_SCHEMAS:
                self._matchers.popitem(last=False)
            return Constraint(self._matchers[schema].deep_copy(), self._vocab_size)

    def _compile(self, schema: str) -> Any:
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
        except ValueError as error:
            raise RequestError(FIELD, f"is no JSON schema: {error}") from None
        matcher = LLMatcher(self._prepared_vocabulary(), grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(FIELD, f"this schema cannot be followed: {matcher.get_error()}")
        return matcher

    def _prepared_vocabulary(self) -> Any:
        if self._vocabulary is None:
            from llguidance.hf import from_tokenizer

            try:
                self._vocabulary = from_tokenizer(self._tokenizer, self._vocab_size, sorted(self._eos) or None)
            except ValueError as error:
                raise RequestError(FIELD, f"this model's tokenizer cannot be constrained: {error}") from None
        return self._vocabulary
