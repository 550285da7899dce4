"""Several models, or several depths of one, for each token."""
