"""Documents that a model writes of those there are."""
