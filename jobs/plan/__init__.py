"""What a training job would need before it runs: memory, time and cost, estimated. Nothing here starts anything."""
