"""The analysis `reroute`."""
