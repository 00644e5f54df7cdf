"""Speed of an update on the device: against peers, and against the bandwidth of its memory."""

import sys
from collections.abc import Callable

import torch
from torch import nn

from ema import EMABank, EMAConfig
from tests.benchmarks.bench_ema_figures import milliseconds
from tests.benchmarks.bench_ema_models import (
    DECAY,
    count,
    flat_lerp,
    foreach_lerp,
    gpt_23m,
    gpt_124m,
    many_small,
)
from tests.benchmarks.bench_ema_speed import FLAT, OURS, compare
from tests.benchmarks.ema_peers import PEERS
from tests.benchmarks.rounds import Spread, interleave, ratio
from tests.gpu.figures import figure

FOREACH = "bound: one _foreach_lerp_"


def one_average(name: str, model: nn.Module, rounds: int) -> None:
    """Time an update against the peers, one flat lerp_ over the same bytes, and one foreach call."""
    elements, dtype = count(model), next(model.parameters()).dtype
    device = str(next(model.parameters()).device)
    bounds: dict[str, Callable[[], object]] = {FLAT: flat_lerp(elements * (8 + dtype.itemsize) // 12, device)}
    if dtype == torch.float32:
        bounds[FOREACH] = foreach_lerp(model)
    found = compare(model, PEERS, bounds, rounds=rounds, together=len(PEERS), turn_s=0.02)
    ours = found.times[OURS]
    figure(f"{name}/update", milliseconds(ours), "ms")
    moved = elements * (dtype.itemsize + 8)
    figure(f"{name}/bandwidth", moved / Spread.of(ours).median / 1e9, "GB/s")
    for bound in bounds:
        figure(f"{name}/ours over {bound.removeprefix('bound: ')}", ratio(ours, found.times[bound]), "x")
    fastest = found.fastest(PEERS)
    figure(f"{name}/fastest peer over ours", Spread.of(found.over_ours[fastest]), f"x ({fastest})")


def bank_of_eight(part: str, model: nn.Module, rounds: int) -> None:
    """Time a bank of eight averages against eight averages updated one by one."""
    decays = {f"d{k}": EMAConfig(decay=DECAY) for k in range(8)}
    bank = EMABank(model, decays)
    apart = [EMABank(model, {name: config}) for name, config in decays.items()]
    step = [0, 0]

    def together() -> None:
        bank.update(model, iteration=step[0])
        step[0] += 1

    def one_by_one() -> None:
        for single in apart:
            single.update(model, iteration=step[1])
        step[1] += 1

    times = interleave({"bank": together, "apart": one_by_one}, rounds, turn_s=0.02)
    figure(f"{part}/bank of 8/bank over one by one", ratio(times["bank"], times["apart"]), "x")


def main(device: str, part: str) -> None:
    """Print all figures."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    real = device == "cuda"
    rounds = 20 if real else 2
    models: dict[str, Callable[[], nn.Module]] = {"1,600 small tensors": many_small}
    if real:
        models |= {"23 M": gpt_23m, "124 M": gpt_124m}
    for size, make in models.items():
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{part}/{size} {str(dtype).removeprefix('torch.')}"
            one_average(name, make().to(device=device, dtype=dtype), rounds)
    bank_of_eight(part, (gpt_23m if real else many_small)().to(device), rounds)


if __name__ == "__main__":
    main(*sys.argv[1:])
