"""Mixtures of experts: where they are in a model, and a model whose experts lie elsewhere than it computes."""
