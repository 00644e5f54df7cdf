"""Evaluation of a checkpoint after its run, in any number of processes."""
