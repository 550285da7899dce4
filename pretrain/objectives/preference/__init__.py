"""Learning from answers of which one is preferred to another."""
