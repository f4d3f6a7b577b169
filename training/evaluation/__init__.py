"""Evaluators, metrics, prompts and sheets."""
