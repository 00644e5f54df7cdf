"""Sweeps: the list of runs, their start on this machine or on a cluster, and their states."""
