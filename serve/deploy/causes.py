"""Why a model cannot be served, as Ray Serve tells it, in a sentence or two."""

from __future__ import annotations

import re

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Hung|Unreachable)\b")
"""How the last line of a traceback begins."""
_NOISE = re.compile(r"\s*(This may be due to a problem with .*|See controller logs .*|Error:)$")


def plain(message: str) -> str:
    """Return a message without the traceback in it: what happened, and what was raised. Pure."""
    text = _ANSI.sub("", message).strip()
    if '  File "' not in text:
        return text
    lines = [line for line in text.splitlines() if line.strip()]
    raised = [number for number, line in enumerate(lines) if _RAISED.match(line)]
    told = _NOISE.sub("", lines[0])
    return " ".join([told, *(line.strip() for line in lines[raised[-1] :])]) if raised else told
