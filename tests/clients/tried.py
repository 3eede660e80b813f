"""What every client's script shares. Only the standard library: it runs in the client's own environment.

A script is a list of functions whose first docstring line says what is tried, and `tried.run` at its end. Each is
called once; what it raises is its failure. One JSON object a line goes to the standard output, for run.py.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable

ENDPOINT = os.environ.get("TANDEM_ENDPOINT", "")
"""Where the models are served, without /v1."""
URL = f"{ENDPOINT}/v1"
TEXT = os.environ.get("TANDEM_TEXT_MODEL", "")
"""Name of the text model."""
IMAGES = os.environ.get("TANDEM_IMAGE_MODEL", "")
"""Name of the classifier of 8x8 grey images."""
DIRECTORY = os.environ.get("TANDEM_TEXT_DIRECTORY", "")
"""The text model's directory: its tokenizer, and its weights for the transformers backend."""
KEY = "none"
HELLO = [{"role": "user", "content": "hello"}]


def error(kind: type[Exception], call: Callable[[], object]) -> Exception:
    """Return the error of that kind that a call raises. Raises AssertionError where it raises none."""
    try:
        call()
    except kind as found:
        return found
    raise AssertionError(f"no {kind.__name__} was raised")


def run(*attempts: Callable[[], object]) -> None:
    """Call each attempt and print how it went. Exits with 1 if one failed."""
    failed = 0
    for attempt in attempts:
        what = (attempt.__doc__ or attempt.__name__).strip().splitlines()[0].rstrip(".")
        reason = ""
        try:
            attempt()
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"[:300]
            failed += 1
        print(json.dumps({"tried": what, "ok": not reason, "reason": reason}), flush=True)
    sys.exit(1 if failed else 0)
