"""`python -m launch.evaluate RUN_DIR …`: a checkpoint evaluated again, on other data or otherwise, on any ranks."""

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.cli import command, parse_step, split_arguments
from launch.evaluating.request import Request, Setting
from trainer.cli import importing
from trainer.config.compose import compose, parse_overrides, resume_config, to_config
from trainer.config.targets import trusted_targets
from trainer.config.validate import validate_evaluation
from trainer.distributed.torchrun import launched_world_size
from trainer.errors import ConfigError
from trainer.rundir.directory import RunDir

HELP = """\
Evaluate the live weights and every average of a checkpoint again, as the run did or on other data.

usage: python -m launch.evaluate RUN_DIR [step=last|best|N] [weights=live,ema/*] [KEY=VALUE…] [out=FILE]

  RUN_DIR      a run directory; nothing in it changes but for one more file in evaluations/
  step=…       the checkpoint: the last (default), the one of step N, or the best: of those that are kept, where any of
               the chosen weights had its best evaluation by the primary metric (it says so if another step was better)
  weights=…    names and patterns, default all: live, ema/NAME, or ema where the run keeps one average; without live
               there are no gaps
  KEY=VALUE    what the evaluation shall do differently from the run's last session, whose configuration it begins with:
               data, task, metrics, sharding, trainer.eval_samples, trainer.eval_batch_size, trainer.num_threads,
               trainer.device, trainer.timeout_s; as for python -m trainer
  out=FILE     where the metrics go as JSON; default RUN_DIR/evaluations/<UTC date-time>_step-<N>_<6 hex>.json

Runs in this process or, under torchrun, in any number of them, however many wrote the checkpoint. A package of your own
that the run's configuration names is trusted by allow_targets=[my_package.]. Exit codes: 0 done, 2 bad input.

examples:
  python -m launch.evaluate outputs/mine step=best trainer.eval_samples=0
  torchrun --nproc-per-node=4 -m launch.evaluate outputs/mine weights=live,ema/0.99 data=text_files 'data.paths=[a.txt]'
"""
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
"""What an evaluation may set, these keys and those below them: all that does not make another model of the run."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""

    def work() -> int:
        request, overrides = parse(arguments)
        setting = settle(request.run_dir, overrides)
        with importing():  # torch is imported here, after the command line was read
            from launch.evaluating.checkpoint import evaluate

        return evaluate(request, setting)

    return command(arguments, HELP, work)


def parse(arguments: Sequence[str]) -> tuple[Request, list[str]]:
    """What the command line asks for, and the overrides among its arguments.

    Raises:
        ConfigError: naming the argument.
    """
    own, overrides = split_arguments(arguments[1:], ["step", "weights", "out"])
    for argument in overrides:
        if argument.startswith("-") or not ("=" in argument or argument.startswith("~")):
            raise ConfigError(f"{argument}: expected RUN_DIR first and then KEY=VALUE; see --help")
    weights = tuple(own.get("weights", "*").split(","))
    if not all(weights):
        raise ConfigError(f"weights: expected names or patterns, as in live,ema/*, got {own['weights']!r}")
    if own.get("out") == "":
        raise ConfigError("out: expected a file to make, got nothing")
    out = Path(own["out"]).absolute() if "out" in own else None
    return Request(Path(arguments[0]), parse_step(own.get("step", "last")), weights, out), overrides


def settle(path: Path, overrides: Sequence[str]) -> Setting:
    """The run's own configuration as it was last asked to go on, under the overrides of this command line.

    Raises:
        ConfigError: no run directory, a key that an evaluation may not set, or a value it cannot have.
    """
    run_dir = RunDir.open(path, key="RUN_DIR")
    for override in parse_overrides(overrides):
        key = override.key_or_group
        if not any(f"{key}.".startswith(f"{free}.") for free in (*FREE, "hydra.searchpath")):
            raise ConfigError(
                f"{key}: an evaluation keeps the run's own; it may set step, weights, out, {', '.join(FREE)}"
            )
    composed, typed = compose(overrides)
    config = to_config(resume_config(run_dir.latest_config(), composed, typed))
    validate_evaluation(config, launched_world_size())
    return Setting(run_dir, config, typed, [*composed.allow_targets, *trusted_targets(typed)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
