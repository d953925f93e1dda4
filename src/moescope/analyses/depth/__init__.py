"""The analysis `depth`."""
