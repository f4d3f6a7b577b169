"""The `oner COMMAND` commands that combine several packages: train, fine-tune, evaluate, search, publish."""
