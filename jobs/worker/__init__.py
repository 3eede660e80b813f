"""What runs in a worker of the group, or in a task like it: one rank, its loop, its engine, its model files."""
