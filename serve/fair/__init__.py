"""Fairness: whose request goes to a model next, how many may wait, and how long."""
