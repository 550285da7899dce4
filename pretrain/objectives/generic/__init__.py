"""Objectives of any modality, set up by the model and the processor: the model's own loss."""
