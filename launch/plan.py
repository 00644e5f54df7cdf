"""`python -m launch.plan … world=RANKS`: memory and network traffic of each rank, computed before the run."""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf, open_dict

from ema.config import EMAConfig
from launch.cli import command, make_folder, parse_count, parse_folder, refuse_mistyped, split_arguments
from launch.planning.figures import GIB, Plan, summary, tables
from trainer.cli import ending, importing
from trainer.config.averages import grown_averages
from trainer.config.compose import compose, to_config
from trainer.config.facts import sized, unset_sizes
from trainer.config.own_code import PLANNED, refuse_untrusted
from trainer.config.schema import STRATEGIES, Config, TrainerConfig
from trainer.config.trust import trusted_targets
from trainer.config.validate import validate
from trainer.errors import EXIT_DONE, ConfigError
from trainer.report.format import format_size
from trainer.report.text.table import to_markdown
from trainer.report.text.terminal import print_tables
from trainer.rundir.files import write_atomically
from trainer.rundir.inherited import inherit

HELP = """\
Compute the memory of each rank, the size of a checkpoint and the network traffic of a run, without starting it.

usage: python -m launch.plan [KEY=VALUE…] world=RANKS[,RANKS…] [memory_gib=80] [processes_per_node=8] [out=DIR]

  KEY=VALUE             configuration of the run, as for python -m trainer
  world=RANKS           number of processes, 1 without torchrun; several numbers make one table
  memory_gib=GIB        memory of a rank's device; the command fails if the run needs more
  processes_per_node=N  processes on each node; traffic inside a node and between nodes is counted separately
  out=DIR               also writes plan.md and plan.json (all numbers in bytes)

The plan needs neither the data nor the run's memory or processes. Activations are not counted.
Exit codes: 0 the run fits, 2 bad input or the run does not fit.

examples:
  python -m launch.plan experiment=gpt2_124m sharding=hsdp world=64
  python -m launch.plan experiment=gpt2_124m sharding=fsdp trainer.accumulate=1 world=8,64,512 memory_gib=40
"""


@dataclass(frozen=True)
class Options:
    """Arguments of `launch.plan` other than configuration overrides."""

    worlds: list[int]
    """Numbers of processes to plan for, each at least 1."""
    memory_gib: float = 80.0
    """Memory of a rank's device in GiB, above 0."""
    processes_per_node: int = 8
    """Processes on each node, at least 1."""
    out: Path | None = None
    """Directory for plan.md and plan.json; None writes no files."""


UNUSED = "not used by a plan"
"""Value of data keys that are missing."""
KEYS = ("world", "memory_gib", "processes_per_node", "out")
FLAGS = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--resolve", "--hydra-help")
"""Flags of Hydra that show a configuration."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return command(arguments, HELP, lambda: _make_plan(arguments))


def _make_plan(arguments: Sequence[str]) -> int:
    options, overrides = _parse(arguments)
    config, allowed = _compose(overrides)
    for world in options.worlds:
        averages = validate(config, world)  # the averages are the same for every world
    averages |= grown_averages(config)
    if options.out is not None:
        make_folder(options.out)
    plans = _plan(config, averages, allowed, options)
    printed = [summary(plans)] if len(plans) > 1 else tables(plans[0], options.memory_gib)
    print_tables(printed)
    if options.out is not None:
        write_atomically(options.out / "plan.md", "\n".join(map(to_markdown, printed)))
        everything = [dataclasses.asdict(plan) for plan in plans]
        write_atomically(options.out / "plan.json", json.dumps(everything, indent=1) + "\n")
        print(f"written: {options.out / 'plan.md'}")
    for plan in plans:
        refuse_what_does_not_fit(plan, options.memory_gib, config.trainer)
    return EXIT_DONE


def _parse(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    own, overrides = split_arguments(arguments, KEYS)
    refuse_mistyped(overrides, KEYS)
    worlds = own.get("world", "").split(",")
    if not all(re.fullmatch("0*[1-9][0-9]{0,11}", world) for world in worlds):
        raise ConfigError(
            "world: expected numbers of processes, as in world=1 (no torchrun), world=64 or world=8,64,"
            f" got {own.get('world', 'none')[:300]}"
        )
    per_node = parse_count("processes_per_node", own.get("processes_per_node", "8"))
    flags = [
        argument for argument in overrides if argument.startswith("-") and not argument.startswith(FLAGS)
    ]
    if flags:
        raise ConfigError(f"{flags[0]}: unknown flag; expected KEY=VALUE; see --help")
    memory = _memory(own.get("memory_gib", "80"))
    return Options(list(map(int, worlds)), memory, per_node, parse_folder(own)), overrides


def _memory(text: str) -> float:
    try:
        memory = float(text)
    except ValueError:
        memory = 0.0
    if not 0 < memory < float("inf"):
        raise ConfigError(f"memory_gib: expected a number of GiB above 0, got {text}")
    return memory


def _compose(overrides: list[str]) -> tuple[Config, list[str]]:
    """Return the configuration of the run and the allowed prefixes of `_target_`; missing data keys are filled in."""
    composed, typed = compose(overrides)
    cfg, _ = inherit(composed, typed)
    with open_dict(cfg.data):
        for key in list(cfg.data):
            if OmegaConf.is_missing(cfg.data, key):
                cfg.data[key] = UNUSED
    config, allowed = to_config(cfg), [*composed.allow_targets, *trusted_targets(typed)]
    refuse_untrusted(config, allowed, PLANNED)
    return config, allowed


def _plan(config: Config, averages: dict[str, EMAConfig], allowed: list[str], options: Options) -> list[Plan]:
    with importing():  # importing torch takes seconds, so bad arguments are refused before
        from launch.planning.rehearsal import make_plan
        from trainer.build import load_data

    if unset := unset_sizes(config, allowed):
        if UNUSED in config.data.values():
            raise ConfigError(
                f"model.{unset[0]}: expected a number, because the plan is given no data to read it from"
            )
        config, _ = sized(config, load_data(config, allowed), allowed)
    return [
        make_plan(config, averages, world, options.processes_per_node, allowed) for world in options.worlds
    ]


def refuse_what_does_not_fit(plan: Plan, memory_gib: float, trainer: TrainerConfig) -> None:
    """Check that the rank with the highest memory use fits into `memory_gib`.

    Raises:
        ConfigError: It does not fit; the message names the largest part and a change that would help.
    """
    limit = memory_gib * GIB
    if plan.peak <= limit:
        return
    parts = {
        "parameters, gradients and optimizer": plan.most.state,
        "averages": plan.most.on_device,
        "temporary buffers": plan.moment,
    }
    largest = max(parts, key=lambda name: parts[name])
    raise ConfigError(
        f"memory_gib: a rank of world={plan.world} needs {format_size(plan.peak)} before activations, got"
        f" {memory_gib:g} GiB; {format_size(parts[largest])} are {largest}; {remedy(plan, limit, trainer)}"
    )


def remedy(plan: Plan, limit: float, trainer: TrainerConfig) -> str:
    """Return advice on the smallest change of the configuration that makes the plan fit.

    With more ranks, shards become smaller, but temporary buffers do not. `limit` is the memory of a rank's device in
    bytes. The advice is compatible with the other settings of the run.
    """
    averages = [one for one in plan.most.averages if not one.on_host]
    saved = sum(one.chosen - one.local_shard for one in averages)
    if saved and plan.peak - saved <= limit:
        return f"ema.mode=local_shard would need {format_size(plan.peak - saved)}"
    also = " ema.mode=local_shard" if saved else ""
    shards = plan.world // plan.replicas if STRATEGIES.get(plan.strategy, True) else 1
    whole = (plan.most.state + plan.most.on_device - saved) * shards
    if shards < plan.world and whole / plan.world + plan.moment <= limit:
        return f"sharding=fsdp{also} would need about {format_size(whole / plan.world + plan.moment)}"
    if plan.moment >= limit:
        return "sharding.reshard_after_forward=true or smaller blocks would gather less"
    needed = max(plan.world + 1, math.ceil(whole / (limit - plan.moment)))
    return f"sharding=fsdp{also} would fit on about {_world(needed, plan.processes_per_node, trainer)}"


def _world(needed: int, per_node: int, trainer: TrainerConfig) -> str:
    """Return `world=` with at least `needed` ranks that divide the global batch, on full nodes if possible."""
    batch = trainer.global_batch_size
    whole_nodes = range(-(-needed // per_node) * per_node, batch + 1, per_node)
    for world in [*whole_nodes, *range(needed, min(per_node, batch + 1))]:
        # High accumulation is tried first: it needs less memory for activations, which the plan does not count.
        for accumulate in range(trainer.accumulate, 0, -1):
            if batch % (world * accumulate) == 0:
                also = "" if accumulate == trainer.accumulate else f" trainer.accumulate={accumulate}"
                return f"world={world}{also}"
    world = -(-needed // per_node) * per_node
    return f"world={world}, with a trainer.global_batch_size that is a multiple of {world}"


if __name__ == "__main__":
    sys.exit(ending(lambda: main(sys.argv[1:])))
