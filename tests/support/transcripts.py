"""Transcripts in pages: which files they show, which commands they run, and what those print.

A fenced block whose info string has a second word is a file of that name. In a block `console`, lines after `$ ` are
commands, lines after `> ` continue them, and all others are what the command prints, in order but not in full; "…" in
them stands for anything.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
TIMEOUT_S = 300


@dataclass(frozen=True)
class File:
    """A file that the page shows, to be written."""

    name: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command for the shell, and the lines that it should print."""

    line: str
    shown: tuple[str, ...]


def steps(page: str, heading: str) -> list[File | Command]:
    """List what the section `## heading` of a Markdown page does, in order."""
    section = page.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [step for block in BLOCK.finditer(section) for step in _steps(block["info"], block["body"])]


def _steps(info: str, body: str) -> Iterator[File | Command]:
    kind, _, name = info.partition(" ")
    if name:
        yield File(name, body)
    elif kind == "console":
        for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
            first, *rest = part.splitlines()
            more = [line[2:] for line in rest if line.startswith("> ")]
            yield Command("\n".join([first, *more]), tuple(line for line in rest if not line.startswith("> ")))


def run(step: File | Command, folder: Path, environment: Mapping[str, str], replaced: Mapping[str, str]) -> None:
    """Write a file or run a command in `folder`; `replaced` are parts of commands that a test must change.

    Raises AssertionError if the command fails or prints something else.
    """
    if isinstance(step, File):
        (folder / step.name).write_text(step.text, encoding="utf-8")
        return
    line = step.line
    for old, new in replaced.items():
        line = line.replace(old, new)
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=dict(environment), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, f"$ {line}\n{printed}"
    missing = not_printed(step.shown, printed)
    assert missing is None, f"the page shows {missing!r}, but\n$ {line}\n{printed}"


def not_printed(shown: tuple[str, ...], printed: str) -> str | None:
    """Return the first of the `shown` lines that was not printed after those before it; None if all were."""
    left = iter(printed.splitlines())
    for line in shown:
        pattern = re.compile(".*".join(map(re.escape, line.strip().split("…"))))
        if not any(pattern.fullmatch(candidate.strip()) for candidate in left):
            return line
    return None
