"""Other blocks: activations, norms, attention, depth, exits."""
