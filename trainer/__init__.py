"""One training run, in one or many processes: `python -m trainer`."""
