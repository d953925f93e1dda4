"""The analysis `ensemble`."""
