"""Phase `sweep`: trials of one training job, each a driver of its own (trial.py) below the sweep's."""
