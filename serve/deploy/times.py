"""How long what leaves may take, beside what a spec says of it. Nothing of Ray is imported."""

from __future__ import annotations

LEAVE_S = 5.0
"""What a replica has beyond `drain_s` to give its requests back and to stop its engine, before Serve ends it."""
