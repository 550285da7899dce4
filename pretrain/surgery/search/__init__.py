"""Search: a smaller model among those that one model holds."""
