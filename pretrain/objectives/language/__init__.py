"""Learning from text alone: predict, restore or recognise tokens."""
