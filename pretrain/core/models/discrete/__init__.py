"""Discrete hidden states: what is quantised inside a model, seen and set from outside."""
