"""Checkpoints: their content, their files, and the resumption of a run."""
