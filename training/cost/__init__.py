"""Estimates of what a run needs: memory, operations, hours."""
