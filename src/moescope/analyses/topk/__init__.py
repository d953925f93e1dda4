"""The analysis `topk`."""
