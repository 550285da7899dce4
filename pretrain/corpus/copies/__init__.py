"""Which documents are copies of others: by their signatures, and training documents beside those that are held out."""
