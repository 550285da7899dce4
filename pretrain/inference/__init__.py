"""What a tuned checkpoint says of texts: its labels, tags, numbers and answers, file by file or from Python."""
