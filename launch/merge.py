"""`python -m launch.merge CHECKPOINT… profile=… out=…`: weighted sum of the weights of checkpoints of any library."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path

from launch.cli import command, parse_count, refuse_mistyped, split_arguments
from launch.evaluate import settle
from launch.evaluating.request import Setting
from launch.exporting.files import parse_out, parse_size
from launch.merging.options import Options, parse_coefficients
from launch.merging.order import Snapshot, find, in_order, with_steps
from trainer.cli import ending, importing
from trainer.distributed.torchrun import launched_world_size
from trainer.errors import EXIT_DONE, ConfigError
from trainer.shell.printable import print_text

HELP = """\
Merge checkpoints of one training into one set of weights, in place of a decay of the learning rate.

usage: python -m launch.merge CHECKPOINT… profile=PROFILE out=OUT [KEY=VALUE…]

  CHECKPOINT      paths or quoted patterns: a run directory, which means all its checkpoints, or some of them
                  (RUN_DIR/checkpoints/step-*), with :ema/NAME for an average; safetensors; folders of transformers or
                  diffusers; files of torch.save (FILE.pt:KEY if it has several state dicts). They are sorted by the
                  steps in their names; *.tmp and *.stale-1 match no pattern
  profile=        what the merge replaces:
                    minus_sqrt, linear, cosine, or a learning-rate schedule such as wsd: this decay of the learning
                    rate, over the merged checkpoints; uniform: their mean, the same as linear
                    decay:0.999, halflife:STEPS, power:SIGMA_REL, fraction:0.05: as close as possible to this average
                    FILE.txt, FILE.npy: as close as possible to these weights of the newest steps, one a step, sum 1
  coefficients=   instead of profile: one number a checkpoint, as in [0.25,0.75], sum 1; if the names have no steps, the
                  newest checkpoint is the last
  window=K        merge the K newest checkpoints (default: all)
  out=            FILE.safetensors or FOLDER/, a path that does not exist yet; if the newest checkpoint is a folder of
                  transformers or diffusers, a folder also gets its configuration, so that from_pretrained loads it
  max_shard_size=5GB  largest size of a file; a larger result becomes several files with an index
  evaluate=RUN_DIR    evaluate the result, beside the newest checkpoint, on the evaluation data of this run
  'allow_targets=[my_package.]'  trusts a package of your own that the configuration of RUN_DIR names

Names, shapes and types of the tensors must agree. Sums are taken in float64 and rounded to the stored type; integers
are those of the newest checkpoint. Only a part of one tensor is in memory at a time (of checkpoints of ours, one
tensor). The metadata of the files names the sources, their SHA-256 and the coefficients. No code in a file is run.
Exit codes: 0 done, 2 bad input.

examples:
  python -m launch.merge outputs/mine profile=linear out=merged.safetensors evaluate=outputs/mine
  python -m launch.merge 'llama/checkpoint-*' profile=linear window=8 out=merged/
"""
KEYS = ("profile", "coefficients", "window", "out", "max_shard_size", "evaluate", "allow_targets")
"""Keys of the command line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return command(arguments, HELP, lambda: _merge(arguments))


def _merge(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    options.out.require_free()
    with importing():  # importing torch takes seconds, so bad arguments are refused before
        from launch.merging.evaluating import check_fits, evaluate_beside
        from launch.merging.sources import Reader, open_reader
        from launch.merging.weights import merge, opened
    readers = opened(options)

    def write() -> Reader:
        print_text(*merge(options, readers))
        return open_reader(Snapshot(str(options.out), options.out.path, None))

    if options.evaluated is None:
        write()
        return EXIT_DONE
    check_fits(options.evaluated, readers[-1])
    return evaluate_beside(options.evaluated, readers[-1], write)


def parse(arguments: Sequence[str]) -> Options:
    """Return the parsed command line.

    Raises:
        ConfigError: An argument is invalid, or the checkpoints cannot be put in order; the message names it.
    """
    if launched_world_size() > 1:
        raise ConfigError("merge: expected one process, got torchrun with several")
    own, sources = split_arguments(arguments, KEYS)
    refuse_mistyped((word for word in sources if not glob(word)), KEYS)
    if not sources:
        raise ConfigError("expected checkpoints, got none; see --help")
    if ("profile" in own) == ("coefficients" in own):
        raise ConfigError("profile: expected either profile= or coefficients=; see --help")
    if "window" in own and "coefficients" in own:
        raise ConfigError("window: expected with profile=; coefficients= has one number a checkpoint")
    found = find(sources)
    coefficients = None
    if "coefficients" in own:
        snapshots = in_order(found) if len(found) != len(sources) else with_steps(found)
        snapshots, coefficients = _paired(snapshots, parse_coefficients(own["coefficients"]))
    else:
        snapshots = in_order(found)
        if len(snapshots) < 2:
            raise ConfigError(
                f"profile: expected at least two checkpoints to merge, found {snapshots[0].text};"
                " trainer.save_every and trainer.keep_checkpoints decide how many a run keeps"
            )
        if "window" in own:
            window = parse_count("window", own["window"])
            if len(snapshots) < window:
                raise ConfigError(f"window: expected at least {window} checkpoints, found {len(snapshots)}")
            snapshots = snapshots[-window:]
    return Options(
        snapshots=snapshots,
        profile=own.get("profile", ""),
        coefficients=coefficients,
        out=parse_out(own.get("out", "")),
        max_shard_bytes=parse_size(own.get("max_shard_size", "5GB")),
        evaluated=_settled(own),
    )


def _paired(
    snapshots: Sequence[Snapshot], coefficients: Sequence[float]
) -> tuple[list[Snapshot], list[float]]:
    """Return checkpoints and their coefficients, the newest last if they have steps."""
    if len(coefficients) != len(snapshots):
        raise ConfigError(
            f"coefficients: expected {len(snapshots)}, one a checkpoint, got {len(coefficients)}"
        )
    pairs = sorted(zip(snapshots, coefficients, strict=True), key=lambda pair: pair[0].step or 0)
    return [snapshot for snapshot, _ in pairs], [x for _, x in pairs]


def _settled(own: Mapping[str, str]) -> Setting | None:
    """Return the configuration of the run of `evaluate=`, or None."""
    if "evaluate" not in own:
        return None
    trusted = [f"allow_targets={own['allow_targets']}"] if "allow_targets" in own else []
    return replace(settle(Path(own["evaluate"]), trusted), overrides=[])


if __name__ == "__main__":
    sys.exit(ending(lambda: main(sys.argv[1:])))
