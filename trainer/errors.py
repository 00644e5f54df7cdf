"""The error that every command prints as one line, and the exit codes."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75
"""A signal stopped the run after its state was saved; `resume=RUN_DIR` continues it."""


class ConfigError(Exception):
    """Bad input: one line that names the key or the file and what was expected."""
