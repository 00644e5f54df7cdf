"""The report as pictures."""
