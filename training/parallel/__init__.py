"""Processes: what they exchange and how a model is spread over them."""
