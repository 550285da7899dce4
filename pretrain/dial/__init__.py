"""The dial: a budget, a corpus and a machine in; width, depth, vocabulary, batch, rate and a predicted loss out."""
