"""Objectives that make a model forget what it was trained on."""
