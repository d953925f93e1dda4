"""One file per analysis: the figures that belong to its result."""
