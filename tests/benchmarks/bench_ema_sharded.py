"""An average of each rank's own shard against one all-gather per parameter: FSDP2, two gloo processes, one machine."""

import math
import random

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from ema import EMAConfig, ExponentialMovingAverage
from tests.benchmarks.bench_ema_figures import Figure, Target, milliseconds
from tests.benchmarks.bench_ema_models import DECAY, Tree, count, distance, gpt_23m, train
from tests.benchmarks.bench_ema_speed import SAME_WORK
from tests.benchmarks.rounds import no_collection, ratio, seconds
from tests.ranks import RankPool

WORLD = 2
SHARDED, GATHERED = "ours, local_shard", "one all-gather per parameter"


class Gathered:
    """The plain way to average a sharded model: gather each parameter, blend it into a whole shadow on every rank."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.shadow = {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        for name, parameter in self._model.named_parameters():
            self.shadow[name].lerp_(parameter.detach().full_tensor(), 1 - DECAY)


def sharded_model(tiny: bool) -> nn.Module:
    """The model of 23 M parameters, or a small one, sharded block by block over all ranks."""
    model = Tree(16, 1024) if tiny else gpt_23m()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shadow_bytes(tensors: list[Tensor]) -> int:
    """Bytes of memory that this rank holds for them, each storage counted once and whole."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return sum(storages.values())


def on_rank(rounds: int, tiny: bool) -> dict[str, object]:
    """Measure on one rank; all ranks call.

    Every turn begins with a barrier, and orders and numbers of calls are the same on all ranks.
    """
    model = sharded_model(tiny)
    names = [name for name, _ in model.named_parameters()]
    average = ExponentialMovingAverage(model, EMAConfig(decay=DECAY, mode="local_shard"))
    gathered = Gathered(model)
    iteration = -1

    def update() -> None:
        nonlocal iteration
        iteration += 1
        average.update(model, iteration=iteration)

    for _ in range(3):
        update()
        gathered.update()
        train(model)
    state = average.state_dict()
    apart = distance([state[name].full_tensor() for name in names], list(gathered.shadow.values()))
    if not apart <= SAME_WORK:
        raise AssertionError(f"{SHARDED}: {apart:.1e} away from {GATHERED}")
    counted = {}
    for name, call in ((SHARDED, update), (GATHERED, gathered.update)):
        with CommDebugMode() as mode:
            call()
        counted[name] = mode.get_total_counts()
    return {
        "times": _take_turns({SHARDED: (update, 20), GATHERED: (gathered.update, 2)}, rounds),
        "collectives": counted,
        "bytes": shadow_bytes([state[name] for name in names]),
        "fair_bytes": 4 * count(model) / dist.get_world_size(),
        "elements": count(model),
    }


def _take_turns(calls: dict, rounds: int) -> dict[str, list[float]]:
    names, order = list(calls), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    with no_collection():
        for _ in range(rounds):
            order.shuffle(names)
            for name in names:
                call, repeats = calls[name]
                call()
                dist.barrier()
                times[name].append(seconds(call, repeats))
    return times


def sharded(threads: int, rounds: int, tiny: bool = False) -> list[Figure]:
    """Time, collectives and memory of an update; the slower rank counts. One thread a rank, whatever `threads` is."""
    pool = RankPool()
    try:
        ranks = pool(WORLD, on_rank, max(2, rounds // 2), tiny)
    finally:
        pool.close()
    times = {
        name: [max(pair) for pair in zip(*(rank["times"][name] for rank in ranks), strict=True)]
        for name in ranks[0]["times"]
    }
    most = max(rank["bytes"] / rank["fair_bytes"] for rank in ranks)
    counts = {name: max(rank["collectives"][name] for rank in ranks) for name in times}
    setting = f"{ranks[0]['elements']:,} float32, {WORLD} ranks"
    return [
        Figure(setting, SHARDED, ms=milliseconds(times[SHARDED])),
        Figure(setting, GATHERED, ms=milliseconds(times[GATHERED]), note=f"{counts[GATHERED]} collectives"),
        Figure(
            setting,
            f"{GATHERED} / ours",
            ratio(times[GATHERED], times[SHARDED]),
            target=Target(20, at_least=True),
        ),
        Figure(setting, "collectives in an update", float(counts[SHARDED]), target=Target(0)),
        Figure(
            setting,
            "bytes of shadow on a rank / (total / ranks)",
            math.ceil(most * 1e4) / 1e4,
            target=Target(1.02),
        ),
    ]
