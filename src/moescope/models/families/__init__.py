"""One file per family of sparse blocks."""
