"""The analysis `prune-domain`."""
