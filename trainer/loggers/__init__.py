"""Where metrics go: `metrics.jsonl` always, and wandb, TensorBoard or your own logger besides.

A sink has the methods of `trainer.protocols.Logger`. Only rank 0 calls `make_loggers`; the other ranks hold
`Loggers([])`, so that no caller has to check whether there is a logger.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.schema import LoggerConfig
from trainer.config.targets import resolve_target
from trainer.errors import ConfigError, blamed_on
from trainer.loggers.jsonl import JsonlLogger
from trainer.loggers.tensorboard import TensorBoardLogger
from trainer.loggers.wandb_run import WandbLogger
from trainer.rundir.continuing import Covered, cut_records
from trainer.rundir.directory import METRICS

if TYPE_CHECKING:
    from trainer.protocols import Cell, Logger

__all__ = [
    "JsonlLogger",
    "Loggers",
    "TensorBoardLogger",
    "WandbLogger",
    "make_loggers",
]


class Loggers:
    """Several sinks as one; without a sink it drops everything."""

    def __init__(self, sinks: "Sequence[Logger]") -> None:
        self._sinks = sinks

    @property
    def sync_command(self) -> str | None:
        """The shell command that uploads an offline wandb run, if there is one."""
        commands = (getattr(sink, "sync_command", None) for sink in self._sinks)
        return next(filter(None, commands), None)

    def sync(self) -> Covered | None:
        """Wait until `metrics.jsonl` is on disk, and return its length and digest; None on ranks above 0."""
        return next((sink.sync() for sink in self._sinks if isinstance(sink, JsonlLogger)), None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand one record to every sink."""
        for sink in self._sinks:
            sink.log(step, metrics)

    def image(self, step: int, name: str, path: str) -> None:
        """Hand one PNG file to every sink."""
        for sink in self._sinks:
            sink.image(step, name, path)

    def table(self, step: int, name: str, headers: Sequence[str], rows: "Sequence[Sequence[Cell]]") -> None:
        """Hand one table to every sink."""
        for sink in self._sinks:
            sink.table(step, name, headers, rows)

    def close(self, summary: Mapping[str, float | str], exit_code: int) -> None:
        """Close every sink, also when one of them raises."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close, summary, exit_code)


BUILT_IN = {
    "wandb": "trainer.loggers.wandb_run.WandbLogger",
    "tensorboard": "trainer.loggers.tensorboard.TensorBoardLogger",
}
"""Targets by `logger.name`; a later built-in logger needs no name, its YAML file sets `_target_`."""


def make_loggers(
    config: LoggerConfig,
    *,
    run_dir: Path,
    run_id: str,
    run_config: dict[str, Any],
    resumed_at: int | None,
    covered: Covered | None = None,
    allowed: Sequence[str] = (),
) -> Loggers:
    """The sinks of a run, for rank 0: `run_dir/metrics.jsonl` and the one that the configuration names.

    Args:
        config: The `logger` group.
        run_dir: An existing run directory.
        run_id: wandb's id of the run, the same one in every session of it.
        run_config: The whole configuration as nested dictionaries.
        resumed_at: Step of the checkpoint a resumed run starts from (0 if it had none yet): records of later steps
            are dropped, they are about to be made again. None in a run's first session.
        covered: Records that this checkpoint covers, as for `trainer.rundir.continuing.cut_records`.
        allowed: Further prefixes that `logger._target_` may start with.

    Raises:
        ConfigError: records that were changed, an unknown `logger.name`, a refused target or argument, a package
            that is missing, or a wandb that does not start.
    """
    if config.name not in (*BUILT_IN, "none"):
        raise ConfigError(f"logger.name={config.name}: expected wandb, tensorboard or none")
    path = run_dir / METRICS
    if resumed_at is not None:
        cut_records(path, resumed_at, covered)
    sinks: list[Logger] = [JsonlLogger(path)]
    target = config._target_ or BUILT_IN.get(config.name)
    if target is not None:
        offered = {
            "config": config,
            "run_dir": run_dir,
            "run_id": run_id,
            "run_config": run_config,
            "resumed_at": resumed_at,
        }
        sinks.append(_make_sink(target, config.args, offered, allowed))
    return Loggers(sinks)


def _make_sink(
    target: str, args: Mapping[str, Any], offered: Mapping[str, Any], allowed: Sequence[str]
) -> "Logger":
    kind = resolve_target({"_target_": target}, group="logger", allowed=allowed)
    for method in ("log", "image", "table", "close"):
        if not callable(getattr(kind, method, None)):
            raise ConfigError(f"logger._target_: {target} has no method {method}, which a logger needs")
    for name in args:
        if name in offered:
            raise ConfigError(f"logger.args.{name}: the run sets it")
    signature = inspect.signature(kind)
    arguments = {name: value for name, value in offered.items() if name in signature.parameters}
    arguments |= args
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"logger.args: {target}: {error}") from error
    with blamed_on(f"logger: {target}"):
        sink: Logger = kind(**arguments)
    return sink
