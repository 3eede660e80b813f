"""The page that a failed or recovered job leaves in its MLflow run: readable when the cluster is gone.

It is made of what the run's folder holds: failed attempts with what was decided about each, logs, and stacks.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from jobs.run_folder import RunFolder

LAST_LINES = 30
STACK_LINES = 80
CLOCK = "the clock of "
"""How a remark about a machine's clock begins (jobs/worker/clocks.py, which imports torch)."""


def page(folder: RunFolder, ending: str | None = None) -> str:
    """Write the page in Markdown."""
    found = folder.failures()
    parts = [f"# What happened to {folder.key}", ""]
    parts += [f"{len(found)} failed attempt{'s' if len(found) != 1 else ''} of the worker group."] if found else []
    parts += [ending] if ending else []
    for number, entry in enumerate(found, 1):
        parts += ["", *_section(number, entry)]
    slow = [f"- {_when(entry['time'])}: {entry['said']}" for entry in folder.paces.stragglers()]
    parts += ["", "## Slow nodes", "", *slow] if slow else []
    clocks = [f"- {remark}" for remark in folder.remarks() if remark.startswith(CLOCK)]
    parts += ["", "## Clocks", "", *clocks] if clocks else []
    if ending and not found:
        parts += ["", *evidence(folder, None)]
    return "\n".join(parts) + "\n"


def _section(number: int, entry: dict[str, Any]) -> list[str]:
    who = f", rank {entry['rank']}" if entry.get("rank") is not None else ""
    lines = [
        f"## {number}. {entry['kind']}{who}, after step {entry['step']}",
        "",
        "| | |",
        "| --- | --- |",
        f"| when | {_when(entry['time'])} |",
        *([f"| node | {_place(entry)} |"] if entry.get("where") else []),
        f"| workers | {entry.get('workers', '?')} |",
        f"| decision | {entry['action']}: {entry['reason']} |",
        f"| newest checkpoint | step {entry['checkpoint']}: {entry['step'] - entry['checkpoint']} steps are repeated |",
        "",
        "```",
        *str(entry["message"]).splitlines()[-LAST_LINES:],
        "```",
        *entry.get("evidence", []),
    ]
    return lines


def _place(entry: dict[str, Any]) -> str:
    said = entry.get("node_said")
    return f"{entry['where']}: {said}" if said else str(entry["where"])


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def evidence(folder: RunFolder, attempt: str | None) -> list[str]:
    """Return what an attempt (all, for None) left, as Markdown: last lines of each rank's log, and stacks."""
    titles = {"logs": "last lines of", "stacks": "Python stacks of"}
    lines: list[str] = []
    for kind, path in folder.evidence(attempt):
        text = path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = text[-LAST_LINES:] if kind == "logs" else text[:STACK_LINES]
        if kept:
            lines += ["", f"### {titles[kind]} {path.stem}", "", "```", *kept, "```"]
    return lines
