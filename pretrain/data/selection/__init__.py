"""Which documents to keep."""
