"""The program `polyak`: all commands under one name, found by its own path and not by the working directory."""

import importlib
import sys

from trainer import begin_program
from trainer.cli import ending, run_command
from trainer.errors import EXIT_BAD_INPUT, EXIT_DONE, ConfigError, near
from trainer.shell.commands import MODULES

HELP = """\
Train models with averages of their weights, and compare, evaluate and export the results.

usage: polyak COMMAND [ARGUMENTS…]

  train       train one model; under torchrun: torchrun --nproc-per-node=8 --no-python polyak train …
  sweep       start one run or, with -m, a run for each combination of values
  status      print the state of runs and sweeps
  retry       start the remaining runs of a sweep
  plan        print the memory and communication of a run for given numbers of processes
  compare     compare the live weights with every average, in one run or in many
  evaluate    evaluate a checkpoint again
  export      write the weights of a run as safetensors
  posthoc     make averages of other decays after the run, and evaluate them
  merge       merge checkpoints of any library into one set of weights
  certify     check on this machine that a run is exact: sharded, resumed, exported, averaged and merged
  prune       delete old checkpoints of a run
  tokenize    turn text files into token files for data=tokens
  completion  print the shell's completion script: eval "$(polyak completion bash)", or zsh

polyak COMMAND --help describes a command, and polyak --version prints the versions. python -m trainer is the same as
polyak train, python -m launch the same as polyak sweep, and python -m launch.COMMAND the same as polyak COMMAND, except
python -m trainer.data.tokenize.
"""


def main() -> int:
    """Run the command that the first argument names and return its exit code."""
    begin_program()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments[:2] == ["completion", "--help"]:
        print(HELP, end="", file=sys.stdout if arguments else sys.stderr)
        return EXIT_DONE if arguments else EXIT_BAD_INPUT
    if arguments[0] == "completion":
        return run_command(lambda: _print_completion(arguments[1:]))
    if arguments == ["complete"]:
        return importlib.import_module("launch.completion").complete()
    return ending(lambda: run_command(lambda: _run(*arguments), arguments[:1]))


def _run(name: str, *arguments: str) -> int:
    if name not in MODULES:
        names = [*MODULES, "completion"]
        raise ConfigError(f"{name}: no such command{near(name, names) or '; expected ' + ', '.join(names)}")
    module = MODULES[name] if "." in MODULES[name] else f"{MODULES[name]}.__main__"
    code: int = importlib.import_module(module).main(arguments)
    return code


def _print_completion(arguments: list[str]) -> int:
    from launch.completion import SHELLS, script  # imports Hydra, which the other commands may not need

    if len(arguments) != 1 or arguments[0] not in SHELLS:
        got = " ".join(arguments) or "nothing"
        raise ConfigError(f"completion: expected one of {', '.join(SHELLS)}, got {got}")
    print(script(arguments[0]), end="")
    return EXIT_DONE
