"""Encoders whose one vector holds the passage."""
