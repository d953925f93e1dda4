"""Measures: tensors in, tensors out."""
