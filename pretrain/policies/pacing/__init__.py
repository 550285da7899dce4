"""How much a step of training takes."""
