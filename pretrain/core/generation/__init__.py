"""Continuing tokens: a cache of our own, the loop over it, and rows of prompts over a model's own cache."""
