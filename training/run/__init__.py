"""A run: arguments, engine, batches, checkpoints."""
