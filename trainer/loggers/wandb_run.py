"""Weights & Biases: one run per training run, offline by default."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.schema import LoggerConfig
from trainer.errors import ConfigError
from trainer.loggers.jsonl import STEP

if TYPE_CHECKING:
    from trainer.protocols import Cell


class WandbLogger:
    """One wandb run under `run_dir/wandb`, to be made on rank 0 only.

    `train/step` is the x axis of every metric. wandb's own step counter is left alone: it must grow, and a run
    resumed from a checkpoint goes back. The source code, the git state (a remote's address may hold a token) and
    the console stay out of the record; `meta.json` holds what the project needs of them.
    """

    def __init__(
        self, config: LoggerConfig, *, run_dir: Path, run_id: str, run_config: dict[str, Any]
    ) -> None:
        """Start the run `run_id`, or go on with it.

        Raises:
            ConfigError: wandb refused, most often `logger.mode=online` without a login.
        """
        # Imported here: 0.9 s that runs with another logger need not pay.
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
                name=run_dir.name,
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
        self._image, self._table = wandb.Image, wandb.Table
        self._folder = run_dir / "wandb"
        self._run_id = run_id
        self._offline = config.mode != "online"
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    @property
    def sync_command(self) -> str | None:
        """The command that uploads what was logged offline, every session of a resumed run; None if online."""
        sessions = sorted(self._folder.glob(f"offline-run-*-{self._run_id}"))
        return shlex.join(["wandb", "sync", *map(str, sessions)]) if self._offline else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one record."""
        self._run.log({**metrics, STEP: step})

    def image(self, step: int, name: str, path: str) -> None:
        """Send a PNG file as `name`."""
        self._run.log({name: self._image(path), STEP: step})

    def table(self, step: int, name: str, headers: Sequence[str], rows: "Sequence[Sequence[Cell]]") -> None:
        """Send a table."""
        table = self._table(columns=list(headers), data=[list(row) for row in rows], allow_mixed_types=True)
        self._run.log({name: table, STEP: step})

    def close(self, summary: Mapping[str, float | str], exit_code: int) -> None:
        """Write the summary and end the run; a non-zero `exit_code` marks it failed."""
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=exit_code)
