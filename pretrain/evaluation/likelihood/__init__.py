"""How likely a model finds text."""
