"""Learning what is known of concepts beside the language."""
