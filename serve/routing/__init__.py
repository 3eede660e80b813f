"""Which replica answers a request, and what becomes of it when that replica is lost."""
