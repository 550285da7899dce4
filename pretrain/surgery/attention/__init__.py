"""Surgeries of what attention asks, and of what it is asked."""
