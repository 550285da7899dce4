"""Larger models from smaller ones."""
