"""One pool for training and serving: who may have which part of the cluster now, and why."""
