"""Checkpoints: what one holds, how it is written and read, and how a run is resumed from it."""
