"""Averages from a checkpoint into files that load without this project."""
