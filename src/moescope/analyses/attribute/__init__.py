"""The analysis `attribute`."""
