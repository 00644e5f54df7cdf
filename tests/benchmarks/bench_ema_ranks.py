"""Time of an update on each rank against the number of ranks: 1 / world, as nothing is communicated.

Ranks take turns, so that they do not share the cores of one machine: an update of `local_shard` needs nobody else.
"""

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from ema import EMAConfig, ExponentialMovingAverage
from ema.memory import local
from tests.benchmarks.bench_ema_figures import Figure, Target, milliseconds
from tests.benchmarks.bench_ema_models import DECAY, flat_lerp
from tests.benchmarks.bench_ema_sharded import sharded_model
from tests.benchmarks.rounds import Spread, no_collection, seconds
from tests.ranks import RankPool

WORLDS = (1, 2, 4)
REPEATS = 5
NEARLY = 1.15
"""How far above 1 / world a rank's time may be: a call costs the same however small its shard."""


def on_rank(rounds: int, tiny: bool) -> list[tuple[float, float]]:
    """Seconds of an update on this rank and of one `lerp_` over as many numbers, a pair per round.

    All ranks call, one is timed at a time.
    """
    model = sharded_model(tiny)
    average = ExponentialMovingAverage(model, EMAConfig(decay=DECAY, mode="local_shard"))
    iteration = -1

    def update() -> None:
        nonlocal iteration
        iteration += 1
        average.update(model, iteration=iteration)

    own = sum(local(parameter.detach()).numel() for parameter in model.parameters())
    flat = flat_lerp(own)
    for _ in range(3):
        update()
        flat()
    times = []
    with no_collection():
        for _ in range(rounds):
            for rank in range(dist.get_world_size()):
                dist.barrier()
                if rank == dist.get_rank():
                    update()
                    ours = seconds(update, REPEATS)
                    flat()
                    times.append((ours, seconds(flat, REPEATS)))
    return times


def by_world(
    rounds: int, worlds: Sequence[int] = WORLDS, tiny: bool = False
) -> dict[int, list[tuple[float, float]]]:
    """Pairs of `on_rank` of the rank that was slowest, one per round, by number of ranks."""
    pool = RankPool()
    try:
        return {
            world: [max(turn) for turn in zip(*pool(world, on_rank, rounds, tiny), strict=True)]
            for world in worlds
        }
    finally:
        pool.close()


def draw(path: Path, spreads: dict[int, Spread]) -> None:
    """Milliseconds over ranks, with 1 / world beside them."""
    from matplotlib.figure import Figure as Picture

    worlds = list(spreads)
    medians = [spread.median for spread in spreads.values()]
    picture = Picture(figsize=(5.5, 4), layout="constrained")
    axes = picture.subplots()
    axes.plot(worlds, medians, "o-", label="an update on the slowest rank")
    axes.fill_between(
        worlds, [s.low for s in spreads.values()], [s.high for s in spreads.values()], alpha=0.2, linewidth=0
    )
    axes.plot(worlds, [medians[0] / world for world in worlds], ":", color="grey", label="1 / ranks")
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="ms per update")
    axes.set_xticks(worlds, [str(world) for world in worlds])
    axes.minorticks_off()
    axes.legend()
    picture.savefig(path, dpi=120)


def ranks(threads: int, rounds: int, plot: Path | None = None, tiny: bool = False) -> list[Figure]:
    """Time per rank at 1, 2 and 4 ranks. One thread a rank, whatever `threads` is."""
    times = by_world(max(2, rounds // 2), tiny=tiny)
    spreads = {world: milliseconds([ours for ours, _ in found]) for world, found in times.items()}
    bounds = {world: Spread.of([ours / flat for ours, flat in found]) for world, found in times.items()}
    if plot is not None:
        draw(plot, spreads)
    setting = "an update on the slowest rank, 23 M float32"
    lines = [
        Figure(setting, f"{world} ranks", bounds[world], "x one flat lerp_ of the shard", spread)
        for world, spread in spreads.items()
    ]
    alone = spreads[WORLDS[0]].median
    return lines + [
        Figure(
            setting,
            f"{world} x the time at {world} ranks / the time at 1",
            world * spreads[world].median / alone,
            target=Target(NEARLY),
        )
        for world in WORLDS[1:]
    ]
