"""Analyses: one file per question."""
