"""Diagnoses a training run from its log, its last checkpoint and a small sample of its rows."""
