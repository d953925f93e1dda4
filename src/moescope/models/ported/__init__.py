"""Models that transformers does not have, composed from its parts."""
