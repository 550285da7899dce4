"""Few new weights to train beside frozen ones, and folding them in."""
