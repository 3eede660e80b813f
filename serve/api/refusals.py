"""What a caller is told that is not admitted: 429 with when to come again, or for a spent budget not to."""

from __future__ import annotations

import math

from serve.api.body import ApiError
from serve.api.callers import Caller
from serve.fair.turns import Busy
from serve.keys.limiter import Rate, Verdict
from serve.keys.limits import Limits


def rate_headers(verdict: Verdict) -> dict[str, str]:
    """Return the headers by which OpenAI's clients know how much is left."""
    rates = (("requests", verdict.requests), ("tokens", verdict.tokens))
    return {name: value for kind, rate in rates if rate for name, value in _of_rate(kind, rate).items()}


def _of_rate(kind: str, rate: Rate) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{kind}": str(rate.limit),
        f"x-ratelimit-remaining-{kind}": str(rate.remaining),
        f"x-ratelimit-reset-{kind}": f"{rate.reset_s:.3f}s",
    }


def limited(verdict: Verdict, limits: Limits, headers: dict[str, str], texts: int) -> ApiError:
    """Return the 429 of a rate or of the concurrency, with what `rate_headers` said.

    A request for more texts than its key may ever have in flight is a 400: to try it again would be in vain.
    """
    name = str(verdict.refused_by)
    if math.isinf(verdict.retry_after_s):
        most = f"{getattr(limits, name):,} {_WORDS[name]}"
        message = f"n asks for {texts} texts (n for each prompt), and the key's limit is {most}: ask for fewer at once"
        return ApiError(400, message, code="invalid_value", param="n", headers=headers)
    wait = max(1, math.ceil(verdict.retry_after_s))
    message = f"the key's limit of {getattr(limits, name):,} {_WORDS[name]} is reached; try again in {wait} s"
    return ApiError(429, message, code="rate_limit_exceeded", headers={**headers, "retry-after": str(wait)})


_WORDS = {
    "requests_per_minute": "requests a minute",
    "tokens_per_minute": "tokens a minute",
    "concurrency": "texts at the same time",
}


def busy(model: str, busy: Busy, headers: dict[str, str]) -> ApiError:
    """Return the 429 of a model with more requests than it can serve in time."""
    message = f"{model!r} is busy: {busy.reason}; try again in {busy.retry_after_s} s"
    return ApiError(429, message, code="overloaded", headers={**headers, "retry-after": str(busy.retry_after_s)})


def spent(caller: Caller) -> ApiError:
    """Return the 429 of a spent budget, which clients shall not try again."""
    message = f"{_budget(caller)} is spent"
    return ApiError(429, message, code="insufficient_quota", headers={"x-should-retry": "false"})


def held(caller: Caller) -> ApiError:
    """Return the 429 of a budget whose rest is held back for requests that run or wait."""
    message = f"{_budget(caller)} is held by this key's other requests as far as it is left; try again in 1 s"
    return ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": "1"})


def _budget(caller: Caller) -> str:
    named = [f"{value:,} a {unit}" for unit, value in _budgets(caller.limits) if value is not None]
    return f"the key's budget of tokens ({', '.join(named)})"


def _budgets(limits: Limits) -> tuple[tuple[str, int | None], tuple[str, int | None]]:
    return ("day", limits.tokens_per_day), ("month", limits.tokens_per_month)
