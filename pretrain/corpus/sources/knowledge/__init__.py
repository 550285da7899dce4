"""Sources of what is known of concepts: what they are, and how they are related."""
