"""The analysis `tuned-lens`."""
