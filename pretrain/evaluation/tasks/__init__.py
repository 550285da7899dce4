"""Scores of tasks with references."""
