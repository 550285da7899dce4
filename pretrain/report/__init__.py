"""The page of a run: what came out, whether it is good, and how it came about."""
