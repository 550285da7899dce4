"""Other words for the same documents."""
