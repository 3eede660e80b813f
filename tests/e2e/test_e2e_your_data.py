"""The transcripts of docs/your-data.md, run as they stand: from a file of one's own to an answer over HTTP."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cluster import connect
from cluster.connect import Connection
from serve import endpoints
from tests.support import transcripts

PAGE = Path(__file__).parents[2] / "docs" / "your-data.md"
ADDRESS = "http://127.0.0.1:8000"
"""Where the page's endpoints listen. In a test the port may be another."""


@pytest.mark.parametrize("heading", ["Chats", "A table of texts", "Images"])
def test_transcript(heading: str, cluster: Connection, tmp_path: Path) -> None:
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "COLUMNS": "120"}
    steps = transcripts.steps(PAGE.read_text(encoding="utf-8"), heading)
    assert [step for step in steps if isinstance(step, transcripts.Command) and ADDRESS in step.line]
    try:
        for step in steps:
            asks = isinstance(step, transcripts.Command) and ADDRESS in step.line
            replaced = {ADDRESS: endpoints.endpoint()} if asks else {}
            transcripts.run(step, tmp_path, environment, replaced)
    finally:
        endpoints.down()
    assert connect.connection() == cluster
