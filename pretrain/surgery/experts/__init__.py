"""Mixtures of experts: more experts of a trained model, or fewer."""
