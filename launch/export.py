"""`python -m launch.export RUN_DIR weights=… out=…`: export of a run's weights as safetensors files."""

import sys
from collections.abc import Sequence

from launch.cli import command, parse_step, parse_targets, split_run_dir
from launch.exporting.files import parse_out, parse_size
from launch.exporting.options import Options
from launch.winner import settled
from trainer.cli import ending, importing
from trainer.errors import EXIT_DONE, ConfigError
from trainer.rundir.directory import RunDir
from trainer.shell.printable import print_text

HELP = """\
Write the weights of a run, live or averaged, as safetensors that load without this project.

usage: python -m launch.export RUN_DIR weights=WEIGHTS out=OUT [KEY=VALUE…]

  RUN_DIR         a run directory with a checkpoint, made by any number of processes, or a sweep: its best run
  weights=        live, ema/NAME, ema if the run has one average, or best: the winner by the primary metric or, without
                  a winner, the weights with the best last evaluation
  out=            FILE.safetensors or FOLDER/, a path that does not exist yet; for a model of transformers or diffusers
                  a folder also gets the model's configuration, so that from_pretrained(FOLDER) loads it
  step=last       the checkpoint: last (default), the number of a step, or best: the kept checkpoint at whose step
                  these weights had their best evaluation by the primary metric (a note names a better, deleted step);
                  weights=best step=best is the best evaluation of all weights of the run
  dtype=stored    type of floating-point tensors: stored (default, no conversion), float32, bfloat16 or float16
  max_shard_size=5GB  largest size of a file; a larger export becomes several files with an index, and only the tensors
                  of one file are in memory at a time
  merged=false    for a model of peft: false writes the adapters alone, as a folder for PeftModel.from_pretrained; true
                  merges them into the weights of the base model and writes that; the whole model is in memory then
  'allow_targets=[my_package.]'  trusts a package of your own that contains the model's class

Buffers are exported as the evaluations of the run had them: BatchNorm statistics are re-estimated if the run sets
ema.batchnorm_batches, averaged with ema.average_buffers, and otherwise copies from the live model. Tensors that are
not averaged, such as frozen parameters, have their live values. A file FILE.safetensors of a model of peft has the
tensors of base and adapters under the names of peft, unless they are merged.
Exit codes: 0 done, 2 bad input.

examples:
  python -m launch.export outputs/mine weights=best out=model.safetensors
  python -m launch.export outputs/gpt2 weights=ema out=gpt2/ step=best dtype=bfloat16
"""
KEYS = ("weights", "out", "step", "dtype", "max_shard_size", "merged", "allow_targets")
"""Keys of the command line."""
DTYPES = ("stored", "float32", "bfloat16", "float16")
"""Values of `dtype=`."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return command(arguments, HELP, lambda: _export(arguments))


def _export(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    options.out.require_free()
    with importing():  # importing torch takes seconds, so bad arguments are refused before
        from launch.exporting.weights import export

    print_text(*export(options))
    return EXIT_DONE


def parse(arguments: Sequence[str]) -> Options:
    """Return the options of the command line; the names of weights are checked later.

    Raises:
        ConfigError: An argument is invalid; the message names it.
    """
    run_dir, own = split_run_dir(arguments, KEYS)
    if own.get("dtype", "stored") not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {own['dtype'] or 'nothing'}")
    if own.get("merged", "false") not in ("true", "false"):
        raise ConfigError(f"merged: expected true or false, got {own['merged'] or 'nothing'}")
    out = parse_out(own.get("out", ""))
    step = parse_step(own.get("step", "last"))
    folder, (weights,) = settled(run_dir, [own.get("weights", "")], step)
    return Options(
        run_dir=RunDir.open(folder, key="RUN_DIR"),
        weights=weights,
        out=out,
        step=step,
        dtype=own.get("dtype", "stored"),
        max_shard_bytes=parse_size(own.get("max_shard_size", "5GB")),
        merged=own.get("merged") == "true",
        allowed=parse_targets(own["allow_targets"]) if "allow_targets" in own else [],
    )


if __name__ == "__main__":
    sys.exit(ending(lambda: main(sys.argv[1:])))
