"""What a run is given: the schema of `conf/`, its composition from a command line, and the checks on it. No torch."""

from trainer.config.schema import Config as Config
from trainer.errors import ConfigError as ConfigError
