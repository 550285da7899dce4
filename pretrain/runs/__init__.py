"""Runs as things: what they hold (`shelf`), which results they take (`targets`), and their `command`."""
