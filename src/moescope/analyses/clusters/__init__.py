"""The analysis `clusters`."""
