"""What a run's records say: rates, percentiles, goodput, fairness. Plain functions of the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from serve.bench import record
from serve.bench.record import Record

PERCENTILES = (50, 90, 95, 99)


def percentiles_ms(seconds: Iterable[float]) -> dict[str, float | int] | None:
    """Return count, mean, percentiles (linear between neighbours) and the greatest in ms; None of nothing."""
    values = np.fromiter(seconds, dtype=np.float64)
    if not len(values):
        return None
    values *= 1e3
    found = {
        f"p{at}": round(float(each), 3)
        for at, each in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
    }
    return {"count": len(values), "mean": round(float(values.mean()), 3), **found, "max": round(float(values.max()), 3)}


def jain(shares: Sequence[float]) -> float:
    """Return Jain's index (R. Jain, D. Chiu, W. Hawe, 1984): 1 when all are equal, 1/n when one has everything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def max_min(demands: Sequence[float], capacity: float) -> list[float]:
    """Return the max-min fair shares of `capacity`: what each asks, or equal parts for those who ask for more."""
    shares = [0.0] * len(demands)
    left = capacity
    by_demand = sorted(range(len(demands)), key=lambda at: demands[at])
    for place, at in enumerate(by_demand):
        shares[at] = min(demands[at], left / (len(demands) - place))
        left -= shares[at]
    return shares


def meets(found: Record, slo: Mapping[str, float]) -> bool:
    """Say whether an answer is whole and within all bounds. One that is not known is not kept.

    An answer of one token has no further one, so none was late; where the server tells no usage nobody knows. An answer
    without text counts from its end.
    """
    if found.outcome != record.OK:
        return False
    no_further = found.completion_tokens is not None and found.completion_tokens < 2
    values = {
        "ttft": found.e2e if found.ttft is None else found.ttft,
        "tpot": 0.0 if no_further else found.tpot,
        "e2e": found.e2e,
    }
    return all((value := values[name]) is not None and value <= bound for name, bound in slo.items())


class Window(NamedTuple):
    """The time in which the load was there, of which rates are."""

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return max(self.end - self.begin, 1e-9)

    def share(self, found: Record) -> float:
        """Return the part of a request's time that lies in it: less than 1 for those that its end found running."""
        if found.ended <= self.end:
            return 1.0
        return 0.0 if found.sent >= self.end else (self.end - found.sent) / (found.ended - found.sent)


def window(records: Sequence[Record], open_loop: bool) -> Window:
    """Return the time from the first beginning until the load grew less.

    In the open loop until the last arrival; in the closed one until a user has its answer after the last beginning:
    from then on fewer wait than there are users.
    """
    begin = min((each.intended for each in records), default=0.0)
    last = max((each.intended for each in records), default=0.0)
    if not open_loop:
        last = min((each.ended for each in records if each.ended >= last), default=last)
    return Window(begin, last)


def summary(records: Sequence[Record], slo: Mapping[str, float], open_loop: bool) -> dict[str, Any]:
    """Return all figures of a run."""
    good = [each for each in records if each.outcome == record.OK]
    sending = window(records, open_loop)
    ended = max((each.ended for each in records), default=sending.end)
    whole = Window(sending.begin, ended)
    callers = sorted({each.caller for each in records})
    told: dict[str, Any] = {
        "duration_s": round(whole.seconds, 3),
        "sending_s": round(sending.seconds, 3),
        "drain_s": round(ended - sending.end, 3),
        "requests": counts(records),
        "rates": rates(records, sending),
        "rates_with_drain": rates(records, whole),
        "latency_ms": latencies(good, open_loop),
        "longest_gap_ms": max((round(1e3 * max(each.gaps), 3) for each in records if each.gaps), default=None),
    }
    if slo:
        within = [each for each in records if meets(each, slo)]
        met, good_share = len(within), sum(map(sending.share, within))
        told["slo"] = {"bounds_s": dict(slo), "met": met, "share": round(met / max(1, len(records)), 4),
                       "goodput_requests_per_second": round(good_share / sending.seconds, 3)}  # fmt: skip
    if len(callers) > 1:
        told["callers"] = {name: _of_caller(name, records, sending, open_loop) for name in callers}
        told["fairness"] = fairness(records, callers, open_loop)
    return told


def counts(records: Sequence[Record]) -> dict[str, Any]:
    """Count requests by what became of them, with the first words that were said of each kind of failure."""
    kinds = Counter(each.outcome for each in records)
    details: dict[str, str] = {}
    for each in records:
        if each.outcome != record.OK and each.detail:
            details.setdefault(each.outcome, each.detail)
    apart = (record.OK, record.RATE_LIMITED, record.CUT, record.UNFINISHED)
    return {
        "sent": len(records),
        "completed": kinds[record.OK],
        "rejected_429": kinds[record.RATE_LIMITED],
        "cut_streams": kinds[record.CUT],
        "unfinished": kinds[record.UNFINISHED],
        "failed_otherwise": {kind: count for kind, count in sorted(kinds.items()) if kind not in apart},
        "said": details,
        "sent_again_on_a_new_connection": sum(each.resent for each in records),
    }


def rates(records: Sequence[Record], of: Window) -> dict[str, Any]:
    """Return what was done in a second of a window; tokens are the server's count, also of answers that were cut.

    A request that the window's end found running counts by the part of its time before that. Counts of tokens are of
    the whole run.
    """
    shares = [of.share(each) for each in records]
    completed = sum(share for each, share in zip(records, shares, strict=True) if each.outcome == record.OK)
    prompt, completion = (
        [getattr(each, f"{kind}_tokens") or 0 for each in records] for kind in ("prompt", "completion")
    )
    uncounted = sum(each.outcome == record.OK and each.completion_tokens is None for each in records)
    return {
        "requests_per_second": round(completed / of.seconds, 3),
        "prompt_tokens": sum(prompt),
        "completion_tokens": sum(completion),
        "prompt_tokens_per_second": round(float(np.dot(prompt, shares)) / of.seconds, 1),
        "completion_tokens_per_second": round(float(np.dot(completion, shares)) / of.seconds, 1),
        "answers_without_usage": uncounted,
    }


def latencies(good: Sequence[Record], open_loop: bool) -> dict[str, Any]:
    """Return the percentiles of whole answers, in ms; `queue` is how late the open loop itself sent them."""
    found = {
        "ttft": percentiles_ms(each.ttft for each in good if each.ttft is not None),
        "tpot": percentiles_ms(each.tpot for each in good if each.tpot is not None),
        "itl": percentiles_ms(gap for each in good for gap in each.gaps),
        "e2e": percentiles_ms(each.e2e for each in good),
    }
    if open_loop:
        found["queue"] = percentiles_ms(each.sent - each.intended for each in good)
    return {name: value for name, value in found.items() if value is not None}


def fairness(records: Sequence[Record], callers: Sequence[str], open_loop: bool) -> dict[str, float | str]:
    """Return Jain's index over the tokens that each key got, and in the open loop over its part of its fair share.

    The fair share is max-min over what each key asked for, of what all were served. Where a file's own texts are sent,
    what was asked for is known of the answers alone, and so it is their tokens that are compared.
    """
    served = [float(sum(each.tokens for each in records if each.caller == name)) for name in callers]
    found: dict[str, float | str] = {"jain_of_tokens": round(jain(served), 4)}
    if open_loop:
        answers_alone = any(each.asked_prompt is None for each in records)
        if answers_alone:
            served = [float(sum(r.completion_tokens or 0 for r in records if r.caller == name)) for name in callers]
        asked = [float(sum(r.asked_answer + (0 if answers_alone else r.asked_prompt or 0) for r in records
                           if r.caller == name)) for name in callers]  # fmt: skip
        fair = max_min(asked, sum(served))
        parts = [got / due if due else 1.0 for got, due in zip(served, fair, strict=True)]
        found["jain_of_max_min_shares"] = round(jain(parts), 4)
        found["shares_are_of"] = "tokens of answers" if answers_alone else "tokens"
    return found


def _of_caller(name: str, records: Sequence[Record], sending: Window, open_loop: bool) -> dict[str, Any]:
    own = [each for each in records if each.caller == name]
    good = [each for each in own if each.outcome == record.OK]
    return {"requests": counts(own), "rates": rates(own, sending), "latency_ms": latencies(good, open_loop)}
