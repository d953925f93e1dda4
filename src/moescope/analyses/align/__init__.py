"""The analysis `align`."""
