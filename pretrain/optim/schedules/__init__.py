"""The learning rate over training."""
