"""Rules on single documents: what they measure, and which documents they drop."""
