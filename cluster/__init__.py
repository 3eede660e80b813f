"""Where work runs: the embedded cluster on this machine, and the way to any Ray cluster."""
