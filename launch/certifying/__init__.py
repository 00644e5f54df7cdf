"""Checks of a run's model, averages and files on this machine, by a few steps of the run."""
