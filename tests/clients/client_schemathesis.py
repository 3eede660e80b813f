"""Schemathesis over /openapi.json: requests made up from the document, valid and not, to every route."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import tried

HOOKS = Path(__file__).with_name("schemathesis_hooks.py")
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
EXAMPLES = 20
MOST_S = 90


def routes() -> None:
    """every route: no answer 5xx, and each with a status, a type and a body that the document has"""
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{tried.ENDPOINT}/openapi.json"),
        *("--checks", ",".join(CHECKS), "--max-examples", str(EXAMPLES), "--seed", "1", "--max-time", str(MOST_S)),
        *("--continue-on-failure", "--suppress-health-check", "all", "--no-color", "--request-timeout", "60"),
    ]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": HOOKS.stem, "PYTHONPATH": str(HOOKS.parent)}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    print(done.stdout, file=sys.stderr)
    failures = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith(("❌", "- "))]
    assert done.returncode == 0, "; ".join(failures)[:250] or done.stdout[-250:]


tried.run(routes)
