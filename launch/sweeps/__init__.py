"""Sweeps: what their runs are, how they are started here or on a cluster, and how they stand."""
