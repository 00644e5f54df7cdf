"""Log to Trackio, which keeps its records on this machine and has wandb's calls."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.schema import LoggerConfig
from trainer.errors import ConfigError
from trainer.loggers.jsonl import RecordsOnly


class TrackioLogger(RecordsOnly):
    """Logger that sends each record to a run of Trackio; all sessions of a run are one run there."""

    def __init__(self, config: LoggerConfig, *, run_dir: Path, run_config: dict[str, Any]) -> None:
        """Start the run of Trackio with the name of the run directory, or continue it.

        Raises:
            ConfigError: The package trackio is not installed.
        """
        try:
            import trackio
        except ImportError as error:
            raise ConfigError(
                "logger=trackio: the package trackio is missing; in the clone: pip install -e '.[trackio]'"
            ) from error
        self._trackio, self._last_step = trackio, 0
        trackio.init(project=config.project, name=run_dir.name, config=run_config, resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one record."""
        self._last_step = step
        self._trackio.log(dict(metrics), step=step)

    def close(self, summary: Mapping[str, float | str], exit_code: int) -> None:
        """Send the numbers of the summary at the last logged step, and end the run."""
        try:
            numbers = {key: value for key, value in summary.items() if not isinstance(value, str)}
            if numbers:
                self._trackio.log(numbers, step=self._last_step)
        finally:
            self._trackio.finish()
