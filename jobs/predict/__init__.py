"""Batch inference: a model over a data set of any size, each row once, in the input's order (docs/predict.md)."""
