"""The analysis `weights`."""
