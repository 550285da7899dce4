"""Weights that stay off the device until they are wanted."""
