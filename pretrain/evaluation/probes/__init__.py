"""What a model's states know."""
