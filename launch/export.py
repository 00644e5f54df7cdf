"""`python -m launch.export RUN_DIR weights=… out=…`: the weights of a run as safetensors, for others to load."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli import EXIT_SIGNAL, command, parse_step, parse_targets, split_arguments
from launch.exporting.files import parse_out, parse_size
from launch.exporting.options import Options
from trainer.cli import importing
from trainer.errors import EXIT_DONE, ConfigError
from trainer.rundir.directory import RunDir

if TYPE_CHECKING:
    from launch.exporting.weights import Exported

HELP = """\
Write the weights of a run, live or averaged, as safetensors that load without this project.

usage: python -m launch.export RUN_DIR weights=WEIGHTS out=OUT [KEY=VALUE…]

  RUN_DIR         a run directory with a checkpoint, made by any number of processes
  weights=        live, ema/NAME, or ema where the run keeps one average
  out=            FILE.safetensors or FOLDER/, neither of which may exist; for a model of transformers or diffusers
                  a folder also gets its configuration, so that from_pretrained(FOLDER) loads it
  step=last       the checkpoint: last, a number, or best: of those that are kept, where these weights had their best
                  evaluation by the primary metric (it says so if another step was better)
  dtype=stored    of floating-point tensors: stored, float32, bfloat16 or float16
  max_shard_size=5GB  largest file; more becomes several files and their index. One file's tensors are in memory at once
  allow_targets=[my_package.]  where your own model's class is from; the run directory is not trusted to say it

Buffers are exported as the average keeps them: BatchNorm statistics are copies of the live model's, not re-estimated
(train with ema.average_buffers to average them). What is not averaged (frozen parameters) has its live values.
Exit codes: 0 done, 2 bad input.

examples:
  python -m launch.export outputs/mine weights=ema/0.999 out=model.safetensors
  python -m launch.export outputs/gpt2 weights=ema out=gpt2/ step=best dtype=bfloat16
"""
KEYS = ("weights", "out", "step", "dtype", "max_shard_size", "allow_targets")
DTYPES = ("stored", "float32", "bfloat16", "float16")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return command(arguments, HELP, lambda: _export(arguments))


def _export(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    options.out.require_free()
    # Imported here: torch takes longer than to answer --help or to refuse a key.
    with importing():
        from launch.exporting.weights import export

    _show(export(options))
    return EXIT_DONE


def parse(arguments: Sequence[str]) -> Options:
    """The command line.

    Raises:
        ConfigError: naming the key, or what is no run directory.
    """
    own, rest = split_arguments(arguments, KEYS)
    folders = [argument for argument in rest if "=" not in argument or Path(argument).is_dir()]
    if unknown := [argument.partition("=")[0] for argument in rest if argument not in folders]:
        raise ConfigError(f"{unknown[0]}: unknown key; expected {', '.join(KEYS)}")
    if len(folders) != 1:
        raise ConfigError(f"expected one run directory, got {' '.join(folders) or 'none'}; see --help")
    if own.get("dtype", "stored") not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {own['dtype'] or 'nothing'}")
    return Options(
        run_dir=RunDir.open(folders[0], key="RUN_DIR"),
        weights=own.get("weights", ""),
        out=parse_out(own.get("out", "")),
        step=parse_step(own.get("step", "last")),
        dtype=own.get("dtype", "stored"),
        max_shard_bytes=parse_size(own.get("max_shard_size", "5GB")),
        allowed=parse_targets(own["allow_targets"]) if "allow_targets" in own else [],
    )


def _show(done: "Exported") -> None:
    print(f"exported: {done.weights} of {done.run} at step {done.step}")
    for note in done.notes:
        print(f"note: {note}")
    files = f" in {done.num_files} files" if done.num_files > 1 else ""
    print(f"written: {done.out} ({done.num_tensors} tensors, {done.num_bytes:,} bytes{files}, {done.dtypes})")
    print("load it with:", *done.python, sep="\n  ")


def _leave(number: int, frame: object) -> None:
    # An exception, so that what was written aside is removed.
    raise SystemExit(EXIT_SIGNAL + number)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _leave)
    sys.exit(main(sys.argv[1:]))
