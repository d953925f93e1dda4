"""The analysis `damage`."""
