"""The page that a failed or recovered job leaves in its MLflow run: readable when the cluster is gone.

<run>/failures.jsonl            one line per failed attempt of the worker group: class, decision, errors (ray_train.py)
      logs/<attempt>-rank-0.log what each rank printed
      stacks/<attempt>-rank-0.txt   Python stacks of a rank that hung (jobs/worker/watchdog.py)
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

LAST_LINES = 30
STACK_LINES = 80


def failures(folder: Path) -> list[dict[str, Any]]:
    """Return the failures of a run, oldest first."""
    try:
        lines = (folder / "failures.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def append(folder: Path, entry: dict[str, Any]) -> None:
    """Add a failure, on the disk when this returns."""
    with (folder / "failures.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def page(folder: Path, ending: str | None = None) -> str:
    """Write the page in Markdown."""
    found = failures(folder)
    parts = [f"# What happened to {folder.name}", ""]
    parts += [f"{len(found)} failed attempt{'s' if len(found) != 1 else ''} of the worker group."] if found else []
    parts += [ending] if ending else []
    for number, entry in enumerate(found, 1):
        parts += ["", *_section(number, entry)]
    if ending and not found:
        parts += ["", *evidence(folder, None)]
    return "\n".join(parts) + "\n"


def _section(number: int, entry: dict[str, Any]) -> list[str]:
    when = datetime.fromtimestamp(entry["time"], timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    who = f", rank {entry['rank']}" if entry.get("rank") is not None else ""
    lines = [
        f"## {number}. {entry['kind']}{who}, after step {entry['step']}",
        "",
        "| | |",
        "| --- | --- |",
        f"| when | {when} |",
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


def evidence(folder: Path, attempt: str | None) -> list[str]:
    """Return what an attempt (all, for None) left, as Markdown: last lines of each rank's log, and stacks."""
    lines: list[str] = []
    pattern = f"{attempt}-rank-*" if attempt else "*-rank-*"
    for kind, title, limit in (("logs", "last lines of", LAST_LINES), ("stacks", "Python stacks of", STACK_LINES)):
        for path in sorted((folder / kind).glob(pattern)):
            text = path.read_text(encoding="utf-8", errors="replace").splitlines()
            if text:
                kept = text[-limit:] if kind == "logs" else text[:limit]
                lines += ["", f"### {title} {path.stem}", "", "```", *kept, "```"]
    return lines
