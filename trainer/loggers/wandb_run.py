"""Log to Weights & Biases: one wandb run per training run, offline by default."""

import logging
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.config.schema import LoggerConfig
from trainer.errors import ConfigError
from trainer.protocols import Cell
from trainer.rundir.keys import STEP

LONGEST_NAME = 128
"""Longest name of a run that wandb accepts, in characters."""


class WandbLogger:
    """Logger that sends a run to wandb, with its files under `run_dir/wandb`; make it on rank 0 only.

    `train/step` is the x axis of every metric. wandb's own step counter is not used, because it must grow, and a run
    that resumes from a checkpoint goes back to an earlier step. wandb does not record the source code, the git state
    (the URL of a remote may contain a token) or the console. `meta.json` has the commit and the versions instead.
    """

    def __init__(
        self, config: LoggerConfig, *, run_dir: Path, run_id: str, run_config: dict[str, Any]
    ) -> None:
        """Start the wandb run `run_id`, or continue it.

        Raises:
            ConfigError: wandb does not start; the most common cause is `logger.mode=online` without a login.
        """
        # Imported here, because the import takes 0.9 s, which runs with another logger do not need.
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_save_requirements=False,
        )
        try:
            self._run = wandb.init(
                dir=run_dir,
                id=run_id,
                name=run_dir.name[:LONGEST_NAME],
                resume="allow",
                mode="online" if config.mode == "online" else "offline",
                project=config.project,
                entity=config.entity,
                group=config.group,
                tags=config.tags,
                config=run_config,
                settings=settings,
            )
        except wandb.Error as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"logger.mode={config.mode}: wandb did not start: {reason}") from error
        # Without this, each line of its debug.log that finds no room on the disk prints a traceback.
        for handler in logging.getLogger("wandb").handlers:
            handler.handleError = lambda record: None  # type: ignore[method-assign]
        self._image, self._table, self._teardown = wandb.Image, wandb.Table, wandb.teardown
        self._folder = run_dir / "wandb"
        self._run_id = run_id
        self._offline = config.mode != "online"
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    @property
    def sync_command(self) -> str | None:
        """Shell command that uploads the offline records of all sessions of the run; None if the run is online."""
        sessions = sorted(self._folder.glob(f"offline-run-*-{self._run_id}"))
        return shlex.join(["wandb", "sync", *map(str, sessions)]) if self._offline else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one record."""
        self._run.log({**metrics, STEP: step})

    def image(self, step: int, name: str, path: str) -> None:
        """Send a PNG file as `name`."""
        self._run.log({name: self._image(path), STEP: step})

    def table(self, step: int, name: str, headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Send a table."""
        table = self._table(columns=list(headers), data=[list(row) for row in rows], allow_mixed_types=True)
        self._run.log({name: table, STEP: step})

    def close(self, summary: Mapping[str, float | str], exit_code: int) -> None:
        """Write the summary and end the wandb run; an `exit_code` other than 0 marks it as failed."""
        try:
            self._run.summary.update(dict(summary))
            self._run.finish(exit_code=exit_code)
        except Exception:
            # Otherwise wandb's own hook tries again when Python exits, and prints a second traceback.
            with suppress(Exception):
                self._teardown()
            raise
