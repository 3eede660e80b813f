"""How a gateway's numbers travel: packed, so that whoever reads the reports for something else pays for a few bytes.

Every gateway reads all reports twice a second, and looks into the numbers only when it is scraped.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

from serve.metrics.series import Snapshot

LEVEL = 1
"""Of zlib: numbers pack to a tenth, and more effort gains little."""


def pack(snapshot: Snapshot) -> dict[str, Any]:
    """Return what `GatewayState.metrics` holds: the gateway's id in the clear, and all else packed."""
    packed = zlib.compress(json.dumps(snapshot, separators=(",", ":")).encode(), LEVEL)
    return {"gateway": snapshot["gateway"], "packed": packed}


def unpack(metrics: dict[str, Any]) -> Snapshot:
    """Return the snapshot that was packed."""
    snapshot: Snapshot = json.loads(zlib.decompress(metrics["packed"]))
    return snapshot
