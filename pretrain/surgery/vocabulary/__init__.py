"""Other tokens for a model: more, fewer, another language's."""
