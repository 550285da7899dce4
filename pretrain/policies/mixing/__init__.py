"""Which documents training sees, and how much each counts."""
