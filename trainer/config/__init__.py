"""The configuration of a run: its schema, its composition from a command line, and its checks. Imports no torch."""
