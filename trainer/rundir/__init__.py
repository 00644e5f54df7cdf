"""A run directory: its files, its lock and its records. Imports no torch."""
