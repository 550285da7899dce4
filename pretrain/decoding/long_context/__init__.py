"""Prompts beyond what attention affords or the model was trained at."""
