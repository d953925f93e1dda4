"""Experts and adapters as plain tensors."""
