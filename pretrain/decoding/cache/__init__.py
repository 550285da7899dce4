"""Fewer or better packed keys and values."""
