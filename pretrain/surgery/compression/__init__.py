"""Smaller models: quantised, pruned, factorised, of palettes."""
