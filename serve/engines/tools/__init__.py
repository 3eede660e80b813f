"""Calls of functions: how families of models write them, how they are read, and how a grammar enforces them."""
