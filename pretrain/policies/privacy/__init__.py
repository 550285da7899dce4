"""Training that tells little about any one example."""
