"""One forward pass recorded to disk."""
