"""What a further average costs, and what any of them allocates."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ema import EMABank, EMAConfig, ExponentialMovingAverage, divergence
from models.gpt import GPT
from tests.benchmarks.bench_ema_figures import Figure, Target, milliseconds, threads_text
from tests.benchmarks.bench_ema_models import DECAY, count, flat_lerp, gpt_23m, many_small, train
from tests.benchmarks.bench_ema_speed import FLAT, STEPS, begin
from tests.benchmarks.ema_peers import PEERS, Make, ours
from tests.benchmarks.rounds import Spread, interleave, no_collection, ratio
from trainer.config.compose import compose, to_config

SIZE = 8
NEVER = 10**9
TOO_SMALL = 1 << 14
"""Elements up to which the live tensors are copied into one flat scratch, once for all averages of a bank."""
ONE, EIGHT, APART = "an average", f"a bank of {SIZE}", f"{SIZE} averages of their own"
WALK, GATHER = "the walk", "the gathering of small tensors"


def _configs(size: int = SIZE) -> dict[str, EMAConfig]:
    return {f"{n}": EMAConfig(decay=1 - 2.0 ** -(n + 3)) for n in range(size)}


def _updating(average: ExponentialMovingAverage | EMABank, model: nn.Module) -> Callable[[], None]:
    iteration = -1

    def update() -> None:
        nonlocal iteration
        iteration += 1
        average.update(model, iteration=iteration)

    return update


def _gathering(model: nn.Module) -> Callable[[], object]:
    """The copy of the small tensors into one flat scratch, as plainly as it can be done."""
    parts = [
        parameter.detach().view(-1) for parameter in model.parameters() if parameter.numel() <= TOO_SMALL
    ]
    if not parts:
        return lambda: None
    scratch = torch.cat(parts)
    return lambda: torch.cat(parts, out=scratch)


def bank(
    threads: int, rounds: int, models: Mapping[str, Callable[[], nn.Module]] | None = None
) -> list[Figure]:
    """A bank of 8 against one average, and against eight that share nothing.

    What a bank shares is the walk, which looks at every site of the model for tensors that were replaced (timed as
    the update of an average that has not started: that is all it does), and the gathering of the tensors that are
    too small to be averaged where they lie (timed by itself). "A walk" is both.

    One average of small tensors fits into the caches and eight do not; so the same bound is also given against eight
    averages that are updated one after another, which find the caches as the bank does.
    """
    torch.set_num_threads(threads)
    lines = []
    for make in (models or {"small": many_small, "23 M": gpt_23m}).values():
        lines += _bank(make(), threads, rounds)
    return lines


def _bank(model: nn.Module, threads: int, rounds: int) -> list[Figure]:
    singles = [_updating(ExponentialMovingAverage(model, config), model) for config in _configs().values()]
    waiting = ExponentialMovingAverage(model, EMAConfig(start_iter=NEVER))
    times = interleave(
        {
            ONE: _updating(ExponentialMovingAverage(model, EMAConfig(decay=DECAY)), model),
            EIGHT: _updating(EMABank(model, _configs()), model),
            APART: lambda: [update() for update in singles],
            WALK: _updating(waiting, model),
            GATHER: _gathering(model),
            FLAT: flat_lerp(count(model)),
        },
        rounds,
    )
    walks = [(SIZE - 1) * sum(both) for both in zip(times[WALK], times[GATHER], strict=True)]
    with_walks = [eight + walk for eight, walk in zip(times[EIGHT], walks, strict=True)]
    eight_times = [SIZE * one for one in times[ONE]]
    further = [(eight - one) / (SIZE - 1) for eight, one in zip(times[EIGHT], times[ONE], strict=True)]
    setting = f"{count(model):,} in {len(list(model.parameters())):,} tensors, {threads_text(threads)}"
    return [
        *(Figure(setting, name, ms=milliseconds(own)) for name, own in times.items()),
        *(
            Figure(setting, f"({EIGHT} + 7 walks) / {what}", ratio(with_walks, own), target=Target(1.0))
            for what, own in ((f"{SIZE} times {ONE}", eight_times), (APART, times[APART]))
        ),
        Figure(setting, "a further average / one flat lerp_", ratio(further, times[FLAT])),
    ]


def quickstart(threads: int, rounds: int, overrides: tuple[str, ...] = ()) -> list[Figure]:
    """A bank of 8 in the quickstart's step: forward, backward, clipping, AdamW; then the update, with cold caches.

    The divergence of all averages, which the trainer logs every `log_every` steps, counts with its share.
    """
    torch.set_num_threads(threads)
    config = to_config(compose(["experiment=quickstart", "model.vocab_size=256", *overrides])[0])
    shape = {key: value for key, value in config.model.items() if key != "_target_"}
    model = GPT(**shape)
    averages = EMABank(model, _configs())
    update, step = _updating(averages, model), _step(model, config)
    parts: dict[str, list[float]] = {"the step": [], "the update": [], "the divergence": []}
    calls: list[Callable[[], object]] = [step, update, lambda: divergence(averages, model)]
    with no_collection():
        for done in range(max(2, rounds) + 2):
            for times, call in zip(parts.values(), calls, strict=True):
                start = time.perf_counter()
                call()
                if done >= 2:
                    times.append(time.perf_counter() - start)
    every = config.trainer.log_every
    cost = [a + b / every for a, b in zip(parts["the update"], parts["the divergence"], strict=True)]
    percent = Spread.of([100 * a / b for a, b in zip(cost, parts["the step"], strict=True)])
    setting = f"{count(model):,} parameters, {threads_text(threads)}"
    return [
        *(Figure(setting, what, ms=milliseconds(times)) for what, times in parts.items()),
        Figure(
            setting,
            f"{EIGHT}, divergence every {every} steps / the step",
            percent,
            "%",
            target=Target(3.0),
        ),
    ]


def _step(model: nn.Module, config: Any) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    parameters = list(model.parameters())
    size, length = config.trainer.global_batch_size, config.model["context"]
    tokens: Tensor = torch.randint(config.model["vocab_size"], (size, length + 1))

    def step() -> None:
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.trainer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def allocated(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes of tensor memory that a call asks the allocator for, and how many of them it keeps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return sum(size for size in sizes if size > 0), sum(sizes)


def allocation(
    threads: int,
    rounds: int,
    makes: Mapping[str, Callable[[], nn.Module]] | None = None,
    peers: Mapping[str, Make] = PEERS,
) -> list[Figure]:
    """Bytes that an update allocates once it has run, and what is held beside the shadow. No clock is read."""
    torch.set_num_threads(threads)
    lines = []
    for make in (makes or {"small": many_small, "23 M": gpt_23m}).values():
        for dtype in (torch.float32, torch.bfloat16):
            model = make().to(dtype)
            lines += _allocation(model, f"{count(model):,} {str(dtype).removeprefix('torch.')}")
    model = (makes or {"small": many_small})["small"]()
    at_work, _ = begin(model, {"ours": ours, **peers}, False)
    setting = f"{count(model):,} float32"
    del at_work["ours"]
    return [
        *lines,
        *(
            Figure(setting, f"peer: {name}", float(allocated(peer.update)[0]), "bytes an update")
            for name, peer in at_work.items()
        ),
    ]


def _allocation(model: nn.Module, setting: str) -> list[Figure]:
    lines = []
    for what, configs in ((ONE, _configs(1)), (EIGHT, _configs())):
        made: list[EMABank] = []

        def build(configs: dict[str, EMAConfig] = configs, made: list[EMABank] = made) -> None:
            made.append(EMABank(model, configs))
            update = _updating(made[0], model)
            for _ in range(STEPS):
                update()

        _, kept = allocated(build)
        train(model)
        later = allocated(lambda made=made: made[0].update(model, iteration=STEPS))[0]
        beside = kept - len(configs) * 4 * count(model)
        lines += [
            Figure(setting, f"{what}: allocated by an update", float(later), "bytes", target=Target(0)),
            Figure(setting, f"{what}: held beside the shadows", beside / 2**20, "MiB"),
        ]
    return lines
