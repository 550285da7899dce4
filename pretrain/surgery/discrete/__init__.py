"""Discrete hidden states: bottlenecks of vector quantisation inside a trained model."""
