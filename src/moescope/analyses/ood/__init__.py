"""The analysis `ood`."""
