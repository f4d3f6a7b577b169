"""A trained model as a Hub repository: export, card, loading."""
