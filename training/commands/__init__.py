"""What `oner COMMAND` does, where it takes more than one wing: train, fine-tune, evaluate, search, publish."""
