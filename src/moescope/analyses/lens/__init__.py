"""The analysis `lens`."""
