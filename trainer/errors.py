"""The error that every command prints as one line."""


class ConfigError(Exception):
    """Bad input: one line that names the key or the file and what was expected. The exit code is 2."""
