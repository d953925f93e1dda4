"""The analysis `routing`."""
