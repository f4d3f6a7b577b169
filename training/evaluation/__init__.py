"""Evaluation: evaluators, metrics, prompt templates, and sheets of pictures."""
