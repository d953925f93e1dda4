"""The analysis `neurons`."""
