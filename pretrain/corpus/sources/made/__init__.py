"""Sources that make their documents: of random numbers, or as questions about what others read."""
