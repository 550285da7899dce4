"""`python -m pretrain`."""

from pretrain.cli import app

app()
