"""What is known before torch is imported, and how its import takes less time."""
