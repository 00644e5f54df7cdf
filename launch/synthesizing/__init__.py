"""Averages made from stored snapshots, for `launch.posthoc`."""
