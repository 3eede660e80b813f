"""Checkpoints: written by workers, found again by workers and the driver."""
