"""Runs as things: what they are made of (`shelf`), which results they take (`targets`), and their command (`command`)."""
