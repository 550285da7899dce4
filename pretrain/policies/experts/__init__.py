"""Policies of mixtures of experts: how their routers share out the tokens."""
