"""Where Tandem keeps its state on this machine."""

import os
from pathlib import Path


def home() -> Path:
    """Return `$TANDEM_HOME`, or `~/.tandem`, as an absolute path. The folder may not exist yet."""
    return Path(os.environ.get("TANDEM_HOME") or "~/.tandem").expanduser().absolute()
