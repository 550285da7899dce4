"""Sources that make their documents, of nothing but random numbers."""
