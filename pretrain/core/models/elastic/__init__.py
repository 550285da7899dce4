"""Elastic encoders: subnetworks that share a model's weights, and what their attention relates."""
