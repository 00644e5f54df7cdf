"""`python -m launch.posthoc RUN_DIR …`: averages of other decays and profiles, made after the run."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.cli import command, parse_result, parse_step, split_overrides
from launch.evaluate import FREE as FREE
from launch.evaluate import settle
from launch.exporting.files import parse_out
from launch.synthesizing.request import KEYS as KEYS
from launch.synthesizing.request import Request, parse_targets
from trainer.cli import ending, importing
from trainer.distributed.torchrun import refuse_separate_tasks
from trainer.errors import ConfigError

HELP = """\
Make averages that the run did not keep, from its snapshots and checkpoints, and evaluate them.

usage: python -m launch.posthoc RUN_DIR [decay=…] [sigma_rel=…] [halflife=…] [fraction=…] [profile=… window=…]
                                [step=last|N] [basis=live,ema/*] [export=FILE.safetensors] [cooldown=RUN_DIR]
                                [KEY=VALUE…] [out=FILE]

  RUN_DIR      a run directory; ema=posthoc keeps snapshots in it. Its checkpoints and their averages are used too
  decay=…      constant decays, as in decay=0.99,0.999; best (default) searches the decay by itself
  sigma_rel=…  relative widths of the power rule
  halflife=…   half-lives in steps
  fraction=…   half-lives as a fraction of the steps so far
  profile=…    minus_sqrt, linear, cosine or uniform: the average that replaces this decay of the learning rate over the
               newest window=N steps; or FILE.txt or FILE.npy with the weights of the newest steps
  step=…       checkpoint whose step the averages have: last (default) or the number of a step
  basis=…      names and patterns of the stored weights to make them from, default all
  export=…     write the weights that were chosen, or the only average that is named, as safetensors with their sources
               and coefficients
  cooldown=…   a run that was forked from this one with a decay of the learning rate: adds which share of its gain over
               the live weights each average reaches
  KEY=VALUE    changes to the configuration, as for python -m launch.evaluate
  out=FILE     JSON file for the result; default RUN_DIR/evaluations/<UTC date-time>_step-<N>_<6 hex>.json

The coefficients come from the rules and counters that were saved. Each average is evaluated on the run's evaluation
data: half A of the samples chooses the best one, half B confirms it. Beside the JSON file is a picture of the metric
over the decay, as SVG and PNG. The command uses one process or, under torchrun, any number; each makes its own part of
the weights. Exit codes: 0 done, 2 bad input.

examples:
  python -m launch.posthoc outputs/mine
  python -m launch.posthoc outputs/mine decay=0.99,0.995 sigma_rel=0.05 profile=minus_sqrt,linear window=200
  torchrun --nproc-per-node=2 -m launch.posthoc outputs/mine decay=best export=best.safetensors
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""

    def work() -> int:
        refuse_separate_tasks("posthoc")
        request, overrides = parse(arguments)
        setting = settle(request.run_dir, overrides, KEYS)
        with importing():  # importing torch takes seconds, so bad arguments are refused before
            from launch.synthesizing.evaluating import posthoc

        return posthoc(request, setting)

    return command(arguments, HELP, work)


def parse(arguments: Sequence[str]) -> tuple[Request, list[str]]:
    """Return the request of the command line and the configuration overrides among its arguments.

    Raises:
        ConfigError: An argument is invalid; the message names it.
    """
    run_dir, own, overrides = split_overrides(arguments, KEYS)
    step = parse_step(own.get("step", "last"), best=False)
    out = parse_result(own)
    export = parse_out(own["export"], "export", folders=False) if "export" in own else None
    targets, search = parse_targets(own)
    if own.get("cooldown") == "":
        raise ConfigError("cooldown: expected RUN_DIR of a fork, got nothing")
    cooldown = Path(own["cooldown"]) if "cooldown" in own else None
    return Request(run_dir, step, targets, _basis(own), search, out, export, cooldown), overrides


def _basis(own: Mapping[str, str]) -> tuple[str, ...]:
    patterns = tuple(own.get("basis", "*").split(","))
    if not all(patterns):
        raise ConfigError(f"basis: expected names or patterns, as in live,ema/power*, got {own['basis']!r}")
    return patterns


if __name__ == "__main__":
    sys.exit(ending(lambda: main(sys.argv[1:])))
