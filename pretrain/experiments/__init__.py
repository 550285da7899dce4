"""Experiments: recipes against one another at equal compute, and the claims of papers that they test."""
