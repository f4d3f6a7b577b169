"""Losses, teachers and queues: what a step minimises."""
