"""The configuration of a run: its schema, its composition from a command line, and its checks. Imports no torch."""

from trainer.config.schema import Config as Config
from trainer.errors import ConfigError as ConfigError
