"""`python -m launch.evaluate RUN_DIR …`: evaluate a checkpoint again, on any number of ranks, also on other data."""

import sys
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path

from launch.cli import command, parse_result, parse_step, split_overrides
from launch.evaluating.request import Request, Setting
from launch.winner import settled
from trainer.cli import ending, importing
from trainer.config.averages import settle_averages
from trainer.config.compose import compose, parse_overrides, to_config
from trainer.config.frozen import resume_config
from trainer.config.own_code import EVALUATED, refuse_untrusted
from trainer.config.schema import Config
from trainer.config.trust import trusted_targets
from trainer.config.validate import validate_evaluation
from trainer.distributed.torchrun import launched_world_size, refuse_separate_tasks
from trainer.errors import ConfigError, unknown_key
from trainer.evaluation.enough import KEY as EVAL_SAMPLES
from trainer.evaluation.enough import samples_for
from trainer.report.runs import is_compared, read_run
from trainer.rundir.directory import RunDir

HELP = """\
Evaluate the live weights and every average of a checkpoint again, on the run's own data or on other data.

usage: python -m launch.evaluate RUN_DIR [step=last|best|N] [weights=live,ema/*] [KEY=VALUE…] [out=FILE]

  RUN_DIR      a run directory, or a sweep: its best run; the command adds one file in evaluations/ of the run and
               changes nothing else
  step=…       the checkpoint: last (default), the number of a step, or best: the kept checkpoint at whose step one of
               the chosen weights had its best evaluation by the primary metric (a note names a better, deleted step)
  weights=…    names and patterns, default all: live, ema/NAME, ema if the run has one average, or best (the winner by
               the primary metric or, without one, the weights with the best last evaluation; with step=best, those
               with the best evaluation of the run); gaps to the live weights are computed only if live is among them
  KEY=VALUE    changes to the configuration of the run's last session, as for python -m trainer: data, task, metrics,
               sharding, trainer.eval_samples, trainer.eval_batch_size, trainer.num_threads, trainer.device,
               trainer.timeout_s. trainer.eval_samples=auto takes as many samples as separate the best average from
               live and from the closest other one, by the run's last evaluation; at most 16 times those of the run
  out=FILE     JSON file for the metrics; default RUN_DIR/evaluations/<UTC date-time>_step-<N>_<6 hex>.json

The command uses one process or, under torchrun, any number of processes, independent of the number that wrote the
checkpoint. 'allow_targets=[my_package.]' trusts a package of your own that the run's configuration names.
Exit codes: 0 done, 2 bad input.

examples:
  python -m launch.evaluate outputs/mine step=best trainer.eval_samples=0
  torchrun --nproc-per-node=4 -m launch.evaluate outputs/mine weights=live,ema/0.99 data=text_files 'data.paths=[a.txt]'
"""
KEYS = ("step", "weights", "out")
FREE = (
    "data",
    "task",
    "metrics",
    "sharding",
    "trainer.eval_samples",
    "trainer.eval_batch_size",
    "trainer.num_threads",
    "trainer.device",
    "trainer.timeout_s",
    "allow_targets",
)
"""Keys that an evaluation may set, including the keys below them; none of them changes the model."""
AUTO = f"{EVAL_SAMPLES}=auto"


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""

    def work() -> int:
        refuse_separate_tasks("evaluate")
        request, overrides = parse(arguments)
        run_dir, weights = settled(request.run_dir, request.weights, request.step)
        request = replace(request, run_dir=run_dir, weights=tuple(weights))
        setting = settle(request.run_dir, overrides)
        with importing():  # importing torch takes seconds, so bad arguments are refused before
            from launch.evaluating.checkpoint import evaluate

        return evaluate(request, setting)

    return command(arguments, HELP, work)


def parse(arguments: Sequence[str]) -> tuple[Request, list[str]]:
    """Return the request of the command line and the configuration overrides among its arguments.

    Raises:
        ConfigError: An argument is invalid; the message names it.
    """
    run_dir, own, overrides = split_overrides(arguments, KEYS)
    weights = tuple(own.get("weights", "*").split(","))
    if not all(weights):
        raise ConfigError(f"weights: expected names or patterns, as in live,ema/*, got {own['weights']!r}")
    out = parse_result(own)
    return Request(run_dir, parse_step(own.get("step", "last")), weights, out), overrides


def settle(
    path: Path,
    overrides: Sequence[str],
    keys: Sequence[str] = KEYS,
    groups: Collection[str] = EVALUATED,
) -> Setting:
    """Return the configuration of the run's last session with the overrides of this command line applied.

    `keys` are the keys of the command besides those of `FREE`, for the message, and `groups` those that it builds.

    Raises:
        ConfigError: `path` is no run directory, an override has a forbidden key or an invalid value, or the
            configuration names several parts that this command line does not allow.
    """
    run_dir = RunDir.open(path, key="RUN_DIR")
    overrides = with_number(run_dir.path, overrides)
    changed = [override.key_or_group for override in parse_overrides(overrides)]
    known = {own.name for own in fields(Config)} | {"hydra"}
    if unknown := [key for key in changed if key.partition(".")[0] not in known]:
        raise ConfigError(unknown_key(unknown[0], (*keys, *FREE)))
    composed, typed = compose(overrides)
    for key in changed:
        if not any(f"{key}.".startswith(f"{free}.") for free in (*FREE, "hydra.searchpath")):
            raise ConfigError(f"{key}: an evaluation cannot change it; expected {', '.join((*keys, *FREE))}")
    config = to_config(resume_config(run_dir.latest_config(), composed, typed))
    validate_evaluation(config, launched_world_size())
    allowed = [*composed.allow_targets, *trusted_targets(typed)]
    refuse_untrusted(config, allowed, groups)
    return Setting(run_dir, config, settle_averages(config), typed, allowed)


def with_number(path: Path, overrides: Sequence[str]) -> list[str]:
    """Return the overrides with a number in place of `trainer.eval_samples=auto`, if it is among them.

    Raises:
        ConfigError: `auto` is among them, and the run has no evaluation from which the number follows.
    """
    if AUTO not in overrides:
        return list(overrides)
    number = samples_for(read_run(path, is_compared))
    return [f"{EVAL_SAMPLES}={number}" if override == AUTO else override for override in overrides]


if __name__ == "__main__":
    sys.exit(ending(lambda: main(sys.argv[1:])))
