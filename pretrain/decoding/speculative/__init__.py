"""Several tokens a pass, the same text."""
