"""Make the loggers of a run: always `metrics.jsonl`, and any of wandb, TensorBoard, CSV, Trackio and the user's own.

A logger has the methods of `trainer.protocols.Logger`. Only rank 0 calls `make_loggers`. The other ranks use
`Loggers([])`, so that no caller has to check whether there is a logger.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trainer.config.schema import LoggerConfig
from trainer.config.trust import resolve_target
from trainer.errors import EXIT_FAILED, ConfigError, blamed_on, message_of
from trainer.loggers.csv_file import CsvLogger
from trainer.loggers.jsonl import JsonlLogger
from trainer.loggers.tensorboard import TensorBoardLogger
from trainer.loggers.trackio_run import TrackioLogger
from trainer.loggers.wandb_run import WandbLogger
from trainer.protocols import Cell, Logger
from trainer.rundir.continuing import Covered, cut_records
from trainer.rundir.directory import METRICS
from trainer.rundir.pairs import PAIRS, Pairs
from trainer.shell.printable import one_line, print_text

__all__ = [
    "CsvLogger",
    "JsonlLogger",
    "Loggers",
    "TensorBoardLogger",
    "TrackioLogger",
    "WandbLogger",
    "make_loggers",
]


class Loggers:
    """Several loggers that are used as one; without a logger, nothing is logged.

    `metrics.jsonl` and `pairs.jsonl` are part of a run's result, so the run must end if one cannot be written
    (`failed`). Any other logger that raises an error is switched off with one warning.

    Args:
        loggers: loggers of the records.
        pairs: writer of `pairs.jsonl`; None keeps no pairs.
    """

    def __init__(self, loggers: Sequence[Logger], pairs: JsonlLogger | None = None) -> None:
        self._loggers, self._pairs = loggers, pairs
        self._records = next((logger for logger in loggers if isinstance(logger, JsonlLogger)), None)
        self._files = [file for file in (pairs, self._records) if file is not None]
        self._switched_off: list[Logger] = []

    @property
    def sync_command(self) -> str | None:
        """Shell command that uploads an offline wandb run; None if there is no such run."""
        commands = (getattr(logger, "sync_command", None) for logger in self._loggers)
        return next(filter(None, commands), None)

    @property
    def failed(self) -> bool:
        """Whether `metrics.jsonl` or `pairs.jsonl` could not be written, so that the run must save and stop."""
        return any(file.failure is not None for file in self._files)

    def raise_failure(self) -> None:
        """Raise NotSaved if `failed`."""
        for file in self._files:
            file.raise_failure()

    def sync(self) -> dict[str, Covered]:
        """Wait until both files are on disk; return length and digest of each by name, of none on ranks above 0.

        Raises:
            NotSaved: A record cannot be written, or a file is no longer at its path.
        """
        return {file.name: file.sync() for file in self._files}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one record to every logger."""
        self._call(lambda logger: logger.log(step, metrics))

    def keep_pairs(self, pairs: Pairs) -> None:
        """Write the pairs of an evaluation; call it before `log` gets the record of the same step."""
        if self._pairs is not None:
            self._pairs.append(pairs.step, pairs.to_json())

    def image(self, step: int, name: str, path: str) -> None:
        """Send one PNG file to every logger."""
        self._call(lambda logger: logger.image(step, name, path))

    def table(self, step: int, name: str, headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Send one table to every logger."""
        self._call(lambda logger: logger.table(step, name, headers, rows))

    def close(self, summary: Mapping[str, float | str], exit_code: int) -> None:
        """Close every logger, also one that is switched off; a further error of it is not printed."""
        self._call(lambda logger: logger.close(summary, exit_code), also_off=True)
        if self._pairs is not None:
            self._pairs.close(summary, exit_code)

    def _call(self, call: Callable[[Logger], object], also_off: bool = False) -> None:
        for logger in self._loggers:
            if logger is self._records:
                call(logger)
                continue
            is_on = all(logger is not other for other in self._switched_off)
            try:
                if is_on or also_off:
                    call(logger)
            except Exception as error:
                if is_on:
                    self._switch_off(logger, error)

    def _switch_off(self, logger: Logger, error: Exception) -> None:
        self._switched_off.append(logger)
        print_text(
            f"warning: logger: {type(logger).__name__} failed and is off for the rest of this session"
            f" ({type(error).__name__}: {one_line(message_of(error))})",
            error=True,
        )


BUILT_IN = {
    "wandb": "trainer.loggers.wandb_run.WandbLogger",
    "tensorboard": "trainer.loggers.tensorboard.TensorBoardLogger",
    "csv": "trainer.loggers.csv_file.CsvLogger",
    "trackio": "trainer.loggers.trackio_run.TrackioLogger",
}
"""Targets by `logger.name`; any other built-in logger sets `logger._target_` in its YAML file instead."""


def make_loggers(
    config: LoggerConfig,
    *,
    run_dir: Path,
    run_id: str,
    run_config: dict[str, Any],
    resumed_at: int | None,
    covered: Mapping[str, Covered] = MappingProxyType({}),
    allowed: Sequence[str] = (),
) -> Loggers:
    """Make the loggers of a run, on rank 0: `metrics.jsonl`, `pairs.jsonl` and those of the configuration.

    Args:
        config: group `logger` of the configuration.
        run_dir: existing run directory.
        run_id: id of the run at wandb, the same in every session of the run.
        run_config: whole configuration as nested dictionaries.
        resumed_at: step of the checkpoint that a resumed run starts from, 0 if it has no checkpoint. Records of later
            steps are deleted from both files, because the run repeats these steps. None in the first session.
        covered: what this checkpoint covers of both files, by name (`trainer.rundir.continuing.cut_records`).
        allowed: further prefixes that `logger._target_` may start with.

    Raises:
        ConfigError: Records were changed or cannot be written, `logger.name` is unknown, the target or an argument is
            refused, a package is missing, or wandb does not start.
    """
    if config.name not in (*BUILT_IN, "none"):
        raise ConfigError(f"logger.name={config.name}: expected {', '.join(BUILT_IN)} or none")
    target = config._target_ or BUILT_IN.get(config.name)
    if target is None and config.args:
        raise ConfigError(
            f"logger.args.{next(iter(config.args))}: logger.name={config.name} has no arguments"
        )
    record, pairs = _recorders(run_dir, resumed_at, covered)
    loggers: list[Logger] = [record]
    targets = [] if target is None else [(target, config.args)]
    targets += [(BUILT_IN.get(name, name), {}) for name in config.also]
    offered = {
        "config": config,
        "run_dir": run_dir,
        "run_id": run_id,
        "run_config": run_config,
        "resumed_at": resumed_at,
    }
    try:
        for target, args in targets:
            loggers.append(_make_logger(target, args, offered, allowed))
    except BaseException:
        Loggers(loggers, pairs).close({}, EXIT_FAILED)
        raise
    return Loggers(loggers, pairs)


def _recorders(
    run_dir: Path, resumed_at: int | None, covered: Mapping[str, Covered]
) -> tuple[JsonlLogger, JsonlLogger]:
    """Return the writers of `metrics.jsonl` and of `pairs.jsonl`; arguments as for `make_loggers`."""
    path, pairs_path = run_dir / METRICS, run_dir / PAIRS
    try:
        if resumed_at is not None:
            for file in (pairs_path, path):
                cut_records(file, resumed_at, covered.get(file.name))
        return JsonlLogger(path), JsonlLogger(pairs_path)
    except OSError as error:
        blamed = error.filename or path
        raise ConfigError(f"{blamed}: cannot be written: {error.strerror or error}") from error


def _make_logger(
    target: str, args: Mapping[str, Any], offered: Mapping[str, Any], allowed: Sequence[str]
) -> Logger:
    kind = resolve_target({"_target_": target}, group="logger", allowed=allowed)
    for method in ("log", "image", "table", "close"):
        if not callable(getattr(kind, method, None)):
            raise ConfigError(f"logger._target_: {target} has no method {method}, which a logger needs")
    for name in args:
        if name in offered:
            raise ConfigError(f"logger.args.{name}: the run sets this argument; remove it")
    signature = inspect.signature(kind)
    arguments = {name: value for name, value in offered.items() if name in signature.parameters}
    arguments |= args
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"logger.args: {target}: {error}") from error
    with blamed_on(f"logger: {target}"):
        logger: Logger = kind(**arguments)
    return logger
