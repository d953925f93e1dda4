"""The analysis `outputs`."""
