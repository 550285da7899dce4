"""Looking at documents: what is in a folder or a corpus, which languages, how long they are, a few at random."""
