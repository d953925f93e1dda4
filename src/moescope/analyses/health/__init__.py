"""The analysis `health`."""
