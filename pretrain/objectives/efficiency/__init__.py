"""Training models that do less work for a token."""
