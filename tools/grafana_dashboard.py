"""Make cluster/observe/tandem.json, an endpoint's Grafana dashboard: `python tools/grafana_dashboard.py [--check]`.

A panel is a line here and forty in the file. The queries follow from how /metrics tells its numbers
(serve/metrics/series.py): counters have a label `gateway`, so a rate is taken first and then summed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "cluster" / "observe" / "tandem.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
MODEL = '{model=~"$model"}'
WIDTH, HEIGHT = 24, 8
QUANTILES = (0.5, 0.95, 0.99)


class Panel(NamedTuple):
    """One graph: its queries as (expression, legend)."""

    title: str
    unit: str
    queries: Sequence[tuple[str, str]]
    note: str = ""
    stacked: bool = False


def rate(name: str, by: str, labels: str = MODEL) -> tuple[str, str]:
    """Return the query of a counter's rate, by one label."""
    return f"sum by ({by}) (rate({name}{labels}[$__rate_interval]))", f"{{{{{by}}}}}"


def quantiles(title: str, name: str, note: str = "") -> Panel:
    """Return the panel of a histogram's percentiles, over all gateways."""
    buckets = f"sum by (le, model) (rate({name}_bucket{MODEL}[$__rate_interval]))"
    queries = [(f"histogram_quantile({q}, {buckets})", f"{{{{model}}}} p{q * 100:g}") for q in QUANTILES]
    return Panel(title, "s", queries, note)


def now(name: str, legend: str) -> tuple[str, str]:
    """Return the query of a gauge, by model."""
    return f"sum by (model) ({name}{MODEL})", f"{{{{model}}}} {legend}"


ROWS: dict[str, list[Panel]] = {
    "Traffic": [
        Panel("Requests by route", "reqps", [rate("tandem_requests_total", "route")], stacked=True),
        Panel(
            "Requests by status",
            "reqps",
            [rate("tandem_requests_total", "status")],
            "499: the client left before an answer began.",
            stacked=True,
        ),
        Panel(
            "At work and waiting",
            "short",
            [now("tandem_requests_running", "running"), now("tandem_requests_waiting", "waiting")],
        ),
    ],
    "Latency": [
        quantiles("Time to first token", "tandem_time_to_first_token_seconds"),
        quantiles("Time per output token", "tandem_time_per_output_token_seconds", "The mean of each answer."),
        quantiles("Waiting for a turn", "tandem_queue_seconds", "Of requests that were admitted."),
        quantiles("Whole request", "tandem_request_seconds"),
    ],
    "Tokens": [
        Panel("Prompt tokens", "short", [rate("tandem_prompt_tokens_total", "model")], "A second.", stacked=True),
        Panel("Generated tokens", "short", [rate("tandem_generated_tokens_total", "model")], "A second.", stacked=True),
        Panel(
            "Engines' own count",
            "short",
            [now("tandem_tokens_per_second", "")],
            "Tokens that the replicas generate a second.",
        ),
    ],
    "Errors": [
        Panel("Errors by kind", "reqps", [rate("tandem_errors_total", "kind")], stacked=True),
        Panel(
            "Share of 5xx",
            "percentunit",
            [
                (
                    '(sum(rate(tandem_requests_total{status=~"5..", model=~"$model"}[$__rate_interval])) or vector(0))'
                    f" / sum(rate(tandem_requests_total{MODEL}[$__rate_interval]))",
                    "5xx",
                )
            ],
        ),
        Panel(
            "Answers resumed at another replica",
            "reqps",
            [rate("tandem_streams_resumed_total", "model")],
            "Their clients saw nothing of it.",
        ),
    ],
    "Replicas": [
        Panel(
            "Replicas wanted, ready and leaving",
            "short",
            [
                (f"sum by (model, state) (tandem_replicas{MODEL})", "{{model}} {{state}}"),
                now("tandem_scaling_replicas_wanted", "wanted"),
            ],
        ),
        Panel(
            "Decisions of scaling",
            "short",
            [
                (
                    f"sum by (model, direction) (increase(tandem_scaling_decisions_total{MODEL}[$__rate_interval]))",
                    "{{model}} {{direction}}",
                )
            ],
        ),
        Panel(
            "Reason of the last decision",
            "short",
            [(f"max by (model, reason) (tandem_scaling_last_decision_info{MODEL})", "{{model}}: {{reason}}")],
            "In words: `tandem serve status`.",
        ),
        Panel("Gateways", "short", [("max(tandem_gateways)", "gateways")]),
    ],
    "Cache": [
        Panel(
            "Share of the KV caches in use",
            "percentunit",
            [
                (
                    f"sum by (model) (tandem_cache_tokens_used{MODEL})"
                    f" / (sum by (model) (tandem_cache_tokens_capacity{MODEL}) > 0)",
                    "{{model}}",
                )
            ],
        ),
        Panel("Tokens in the KV caches", "short", [now("tandem_cache_tokens_used", "")]),
    ],
    "Keys": [
        Panel(
            "Tokens of the busiest keys",
            "short",
            [
                (
                    f"topk(10, sum by (key) (rate(tandem_key_tokens_total{MODEL}[$__rate_interval])))",
                    "{{key}}",
                )
            ],
            "A second. `other`: all keys that are not shown.",
            stacked=True,
        ),
        Panel("By prompt and answer", "short", [rate("tandem_key_tokens_total", "kind")], stacked=True),
    ],
}


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana's file format has it."""
    return {
        "uid": "tandem-endpoint",
        "title": "Tandem endpoint",
        "tags": ["tandem"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource(), _models()]},
        "panels": list(_laid_out()),
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}}


def _models() -> dict[str, Any]:
    query = "label_values(tandem_replicas, model)"
    # `.*` meets requests of no model too, such as those without a key.
    every = {"includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    variable = {"name": "model", "label": "Model", "type": "query", "datasource": SOURCE, "refresh": 2}
    return {**variable, "query": {"query": query, "refId": "models"}, "definition": query, **every}


def _laid_out() -> Iterator[dict[str, Any]]:
    """Give rows and their panels with their places, one row below the other."""
    number = y = 0
    for title, panels in ROWS.items():
        number += 1
        place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        width = WIDTH // len(panels)
        for at, panel in enumerate(panels):
            number += 1
            yield _graph(panel, number, {"x": at * width, "y": y + 1, "w": width, "h": HEIGHT})
        y += 1 + HEIGHT


def _graph(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    drawn = {"fillOpacity": 20 if panel.stacked else 0, "stacking": {"mode": "normal" if panel.stacked else "none"}}
    targets = [
        {"refId": chr(ord("A") + at), "datasource": SOURCE, "expr": expression, "legendFormat": legend.strip()}
        for at, (expression, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.note,
        "gridPos": place,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": drawn}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def main(arguments: list[str]) -> int:
    """Write the file, or compare it; return the exit code."""
    text = json.dumps(dashboard(), indent=1) + "\n"
    if arguments == ["--check"]:
        fresh = FILE.exists() and FILE.read_text(encoding="utf-8") == text
        name = FILE.relative_to(ROOT)
        print(f"{name} is up to date" if fresh else f"{name} is stale: run python tools/grafana_dashboard.py")
        return int(not fresh)
    FILE.write_text(text, encoding="utf-8")
    print(f"wrote {FILE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
