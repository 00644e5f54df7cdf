"""Evaluation of the live weights and of each average on the same samples."""
