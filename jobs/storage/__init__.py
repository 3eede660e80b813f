"""Where a job keeps what it leaves: a folder that all nodes share, or an object store and a folder on each node."""
