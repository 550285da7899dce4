"""Continuations steered from inside the model."""
