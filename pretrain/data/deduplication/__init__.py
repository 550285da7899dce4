"""Each document once."""
