"""guidellm's command line, synchronous and with several streams."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import tried


def _benchmark(profile: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix="guidellm-"))
    rows = [{"prompt": "the quick brown fox jumps", "output_tokens_count": 6} for _ in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        *(str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target={tried.ENDPOINT},model={tried.TEXT}"),
        *("--profile", profile, "--constraint", "kind=max_requests,count=4"),
        *("--tokenizer", f"kind=huggingface_auto,model={tried.DIRECTORY}"),
        *("--data", f"kind=json_file,path={folder / 'rows.jsonl'}"),
        *("--output", f"kind=json,path={folder / 'out.json'}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-300:]
    report = json.loads((folder / "out.json").read_text())
    requests = report["benchmarks"][0]["metrics"]["request_totals"]
    assert requests["successful"] == 4, requests
    assert requests["errored"] == 0, requests


def synchronous() -> None:
    """guidellm run, one stream"""
    _benchmark("kind=synchronous")


def concurrent() -> None:
    """guidellm run, two streams"""
    _benchmark("kind=concurrent,streams=2")


tried.run(synchronous, concurrent)
