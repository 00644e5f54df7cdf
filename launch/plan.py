"""`python -m launch.plan … world=RANKS`: what a run will hold and send on each rank, before anybody pays for it."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from launch.cli import command, split_arguments
from launch.planning.figures import GIB, Plan, size, summary, tables
from trainer.cli import importing
from trainer.config.compose import compose, resume_config, to_config
from trainer.config.schema import STRATEGIES, Config, TrainerConfig
from trainer.config.validate import validate
from trainer.errors import EXIT_DONE, ConfigError
from trainer.report.text.table import to_markdown
from trainer.report.text.terminal import print_tables
from trainer.rundir.directory import RunDir
from trainer.rundir.files import write_atomically

HELP = """\
Plan a run: memory per rank, checkpoint and network, without its data, its processes or its memory.

usage: python -m launch.plan [KEY=VALUE…] world=RANKS[,RANKS…] [memory_gib=80] [processes_per_node=8] [out=DIR]

  KEY=VALUE             the run, as for python -m trainer
  world=RANKS           number of processes; several numbers make one table
  memory_gib=GIB        memory of a rank's device; what does not fit is refused
  processes_per_node=N  processes that share a node: what is sent inside it and to others
  out=DIR               also write plan.md and plan.json (all numbers in bytes)

Activations are not counted. Exit codes: 0 fits, 2 bad input or does not fit.

examples:
  python -m launch.plan experiment=gpt2_124m sharding=hsdp world=64
  python -m launch.plan experiment=gpt2_124m sharding=fsdp trainer.accumulate=1 world=8,64,512 memory_gib=40
"""


@dataclass(frozen=True)
class Options:
    """What the plan is told besides the run."""

    worlds: list[int]
    memory_gib: float = 80.0
    processes_per_node: int = 8
    out: Path | None = None


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return command(arguments, HELP, lambda: _make_plan(arguments))


def _make_plan(arguments: Sequence[str]) -> int:
    options, overrides = _parse(arguments)
    config, allowed = _compose(overrides)
    for world in options.worlds:
        validate(config, world)
    plans = _plan(config, allowed, options)
    found = [summary(plans)] if len(plans) > 1 else tables(plans[0], options.memory_gib)
    print_tables(found)
    if options.out is not None:
        write_atomically(options.out / "plan.md", "\n".join(map(to_markdown, found)))
        everything = [dataclasses.asdict(plan) for plan in plans]
        write_atomically(options.out / "plan.json", json.dumps(everything, indent=1) + "\n")
        print(f"written: {options.out / 'plan.md'}")
    for plan in plans:
        refuse_what_does_not_fit(plan, options.memory_gib, config.trainer)
    return EXIT_DONE


def _parse(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    own, overrides = split_arguments(arguments, ["world", "memory_gib", "processes_per_node", "out"])
    worlds = own.get("world", "").split(",")
    if not all(world.isdecimal() and int(world) for world in worlds):
        raise ConfigError(
            f"world: expected numbers of processes, as in world=64 or world=8,64, got {own.get('world', 'none')}"
        )
    per_node = own.get("processes_per_node", "8")
    if not per_node.isdecimal() or not int(per_node):
        raise ConfigError(f"processes_per_node: expected a whole number of at least 1, got {per_node}")
    if own.get("out") == "" or ("out" in own and Path(own["out"]).is_file()):
        raise ConfigError(f"out: expected a directory, got {own['out'] or 'nothing'}")
    out = Path(own["out"]) if "out" in own else None
    return Options(
        list(map(int, worlds)), _memory(own.get("memory_gib", "80")), int(per_node), out
    ), overrides


def _memory(text: str) -> float:
    try:
        memory = float(text)
    except ValueError:
        memory = 0.0
    if not 0 < memory < float("inf"):
        raise ConfigError(f"memory_gib: expected a number of GiB above 0, got {text}")
    return memory


def _compose(overrides: list[str]) -> tuple[Config, list[str]]:
    """The configuration as the trainer composes it; data that is not there yet is not asked for."""
    composed, typed = compose(overrides)
    cfg = composed
    if composed.resume is not None:
        cfg = resume_config(RunDir.open(composed.resume).latest_config(), composed, typed)
    _fill_missing(cfg)
    config = to_config(cfg)
    from trainer.config.targets import trusted_targets

    return config, [*composed.allow_targets, *trusted_targets(typed)]


def _fill_missing(cfg: DictConfig) -> None:
    with open_dict(cfg.data):
        for key in list(cfg.data):
            if OmegaConf.is_missing(cfg.data, key):
                cfg.data[key] = "not read by a plan"


def _plan(config: Config, allowed: list[str], options: Options) -> list[Plan]:
    # Imported here: torch takes longer than to answer --help or to refuse a key.
    with importing():
        from launch.planning.rehearsal import make_plan

    return [make_plan(config, world, options.processes_per_node, allowed) for world in options.worlds]


def refuse_what_does_not_fit(plan: Plan, memory_gib: float, trainer: TrainerConfig) -> None:
    """Compare the rank that holds most with `memory_gib`.

    Raises:
        ConfigError: naming what takes most, and the nearest thing that would help.
    """
    limit = memory_gib * GIB
    if plan.peak <= limit:
        return
    parts = {
        "parameters, gradients and optimizer": plan.most.state,
        "averages": plan.most.on_device,
        "what is gathered for a moment": plan.moment,
    }
    most = max(parts, key=lambda name: parts[name])
    raise ConfigError(
        f"memory_gib: a rank of world={plan.world} needs {size(plan.peak)} before activations, got {memory_gib:g} GiB;"
        f" {size(parts[most])} are {most}; {remedy(plan, limit, trainer)}"
    )


def remedy(plan: Plan, limit: float, trainer: TrainerConfig) -> str:
    """The nearest change that makes a plan fit into `limit` bytes, in words: one that `trainer` can run with.

    Shards shrink as the number of ranks they are cut over grows; what is gathered for a moment stays.
    """
    averages = [one for one in plan.most.averages if not one.on_host]
    saved = sum(one.chosen - one.local_shard for one in averages)
    if saved and plan.peak - saved <= limit:
        return f"ema.mode=local_shard would need {size(plan.peak - saved)}"
    also = " ema.mode=local_shard" if saved else ""
    shards = plan.world // plan.replicas if STRATEGIES.get(plan.strategy, True) else 1
    whole = (plan.most.state + plan.most.on_device - saved) * shards
    if shards < plan.world and whole / plan.world + plan.moment <= limit:
        return f"sharding=fsdp{also} would need about {size(whole / plan.world + plan.moment)}"
    if plan.moment >= limit:
        return "sharding.reshard_after_forward=true or smaller blocks would gather less"
    needed = max(plan.world + 1, math.ceil(whole / (limit - plan.moment)))
    return f"sharding=fsdp{also} would fit on about {_world(needed, plan.processes_per_node, trainer)}"


def _world(needed: int, per_node: int, trainer: TrainerConfig) -> str:
    """At least `needed` ranks that divide the global batch, on whole nodes if that can be."""
    batch = trainer.global_batch_size
    whole_nodes = range(-(-needed // per_node) * per_node, batch + 1, per_node)
    for world in [*whole_nodes, *range(needed, min(per_node, batch + 1))]:
        # The more accumulation stays, the smaller are the activations, which are not counted.
        for accumulate in range(trainer.accumulate, 0, -1):
            if batch % (world * accumulate) == 0:
                also = "" if accumulate == trainer.accumulate else f" trainer.accumulate={accumulate}"
                return f"world={world}{also}"
    world = -(-needed // per_node) * per_node
    return f"world={world}, with a trainer.global_batch_size that is a multiple of {world}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
