"""What is known of a corpus before a data stage has made it."""
