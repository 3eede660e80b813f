"""Scaling: how many replicas a model needs now, decided by the work in flight."""
