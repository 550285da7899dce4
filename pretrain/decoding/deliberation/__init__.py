"""Thought before the answer: latent steps, or time between questions."""
