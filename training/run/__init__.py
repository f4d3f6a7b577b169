"""A training run: arguments, engine, batches, checkpoints."""
