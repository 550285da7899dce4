"""One model from several of the same shape."""
