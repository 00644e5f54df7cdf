"""One average against its peers on one model: who does the same work, and how long it takes them."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from tests.benchmarks.bench_ema_figures import Figure, Target, milliseconds, threads_text
from tests.benchmarks.bench_ema_models import (
    count,
    distance,
    flat_lerp,
    foreach_lerp,
    gather_then_lerp,
    gpt_23m,
    gpt_124m,
    many_small,
    train,
)
from tests.benchmarks.ema_peers import PEERS, CannotError, Make, Peer, ours
from tests.benchmarks.rounds import Spread, interleave, ratio

OURS, FLAT = "ours", "bound: one flat lerp_"
SAME_WORK = 1e-6
"""Largest relative L2 distance of two averages after the warm-up. Rounding leaves 1e-7; with a decay of 0.999 in
place of the agreed one it is 2e-4, with an update left out 5e-3."""
STEPS = 3
"""Updates before anything is timed, the copy at the start included; the live weights move in between."""
HELD_BYTES = 4 << 30
"""Of live weights, shadows and the peers' scratch that are held at once: more peers are timed in several groups."""

HOPELESS = 2.0
"""Peers that take more than so many times as long as ours are left out of the next larger model."""

REFUSALS = (CannotError, ImportError, RuntimeError, TypeError, ValueError)
"""How a peer says that it cannot do what was asked."""


@dataclass
class Comparison:
    """Times in rounds of one model."""

    times: dict[str, list[float]] = field(default_factory=dict)
    over_ours: dict[str, list[float]] = field(default_factory=dict)
    """Ratio to ours of the same round."""
    cannot: dict[str, str] = field(default_factory=dict)

    def add(self, times: Mapping[str, list[float]]) -> None:
        """Add a group of contenders that were timed against ours."""
        for name, own in times.items():
            self.times.setdefault(name, []).extend(own)
            against = [a / b for a, b in zip(own, times[OURS], strict=True)]
            self.over_ours.setdefault(name, []).extend(against)

    def fastest(self, peers: Mapping[str, Make]) -> str:
        """The peer with the smallest median ratio."""
        able = [name for name in peers if name in self.times]
        return min(able, key=lambda name: Spread.of(self.over_ours[name]).median)


def begin(
    model: nn.Module, makes: Mapping[str, Make], float32: bool
) -> tuple[dict[str, Peer], dict[str, str]]:
    """Start averages of `model` together and check that they do the same work; the model is trained a little.

    Returns:
        The peers at work, and the messages of those that cannot work on this model.

    Raises:
        SystemExit: if a peer's average is not ours.
    """
    peers: dict[str, Peer] = {}
    cannot: dict[str, str] = {}
    for name, make in makes.items():
        try:
            peers[name] = make(model, float32)
        except REFUSALS as error:
            cannot[name] = _first_line(error)
    for step in range(STEPS):
        if step:
            train(model)
        for name in list(peers):
            try:
                peers[name].update()
            except REFUSALS as error:
                if name == OURS:
                    raise
                del peers[name]
                cannot[name] = _first_line(error)
    reference = peers[OURS].average()
    for name, peer in peers.items():
        apart = distance(peer.average(), reference)
        if not apart <= SAME_WORK:
            raise SystemExit(f"{name}: its average is {apart:.1e} away from ours")
    return peers, cannot


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def compare(
    model: nn.Module,
    peers: Mapping[str, Make],
    bounds: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    together: int,
    turn_s: float = 0.01,
) -> Comparison:
    """Time ours, `together` peers at once, and the bounds against each other.

    Ours and the bounds have their turn in every group, so all ratios are between neighbours in time.
    """
    found = Comparison()
    float32 = any(parameter.dtype != torch.float32 for parameter in model.parameters())
    names = list(peers)
    for start in range(0, len(names), together):
        group = {OURS: ours, **{name: peers[name] for name in names[start : start + together]}}
        at_work, cannot = begin(model, group, float32)
        found.cannot |= cannot
        calls = {name: peer.update for name, peer in at_work.items()}
        found.add(interleave(calls | dict(bounds), rounds, turn_s))
        del at_work, calls
        gc.collect()  # peers refer to themselves in circles
    return found


def figures(setting: str, found: Comparison, bounds: Mapping[str, object]) -> list[Figure]:
    """A line for each contender."""
    lines = []
    for name, times in found.times.items():
        value = None if name == OURS else Spread.of(found.over_ours[name])
        what = name if name == OURS or name in bounds else f"peer: {name}"
        lines.append(Figure(setting, what, value, "" if value is None else "x ours", milliseconds(times)))
    lines += [Figure(setting, f"peer: {name}", note=f"cannot: {why}") for name, why in found.cannot.items()]
    return lines


def small(
    threads: int, rounds: int, model: nn.Module | None = None, peers: Mapping[str, Make] = PEERS
) -> list[Figure]:
    """Many small tensors, float32: what costs is the way to the tensors. All contenders in one group."""
    torch.set_num_threads(threads)
    model = many_small() if model is None else model
    bounds = {
        FLAT: flat_lerp(count(model)),
        "bound: torch.cat, then lerp_": gather_then_lerp(model),
        "bound: one _foreach_lerp_": foreach_lerp(model),
    }
    found = compare(model, peers, bounds, rounds=rounds, together=len(peers), turn_s=0.03)
    setting = f"{len(list(model.parameters())):,} tensors, {threads_text(threads)}"
    fastest = found.fastest(peers)
    target = Target(12, at_least=True) if threads == 1 else None
    verdict = Figure(
        setting, "fastest peer / ours", Spread.of(found.over_ours[fastest]), target=target, note=fastest
    )
    return [*figures(setting, found, bounds), verdict]


def large(
    threads: int,
    rounds: int,
    sizes: Mapping[str, Callable[[], nn.Module]] | None = None,
    peers: Mapping[str, Make] = PEERS,
) -> list[Figure]:
    """Large tensors, float32 and bfloat16 with a float32 shadow: what costs is the memory traffic."""
    torch.set_num_threads(threads)
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        left_out: dict[str, str] = {}
        for make in (sizes or {"23 M": gpt_23m, "124 M": gpt_124m}).values():
            model = make().to(dtype)
            setting = f"{count(model):,} {str(dtype).removeprefix('torch.')}, {threads_text(threads)}"
            able = {name: make for name, make in peers.items() if name not in left_out}
            found, own = _large(model, setting, dtype, rounds, able)
            lines += [*own, *(Figure(setting, f"peer: {name}", note=why) for name, why in left_out.items())]
            left_out |= hopeless(found, able)
    return lines


def hopeless(found: Comparison, peers: Mapping[str, Make]) -> dict[str, str]:
    """Peers that a larger model need not wait for, and why: making one takes longer than timing it.

    The fastest peer is never one of them, for ours is compared with it on every model.
    """
    medians = {name: Spread.of(found.over_ours[name]).median for name in peers if name in found.times}
    limit = max(HOPELESS, min(medians.values()))
    slow = {name: f"left out: {over:.1f} x ours above" for name, over in medians.items() if over > limit}
    return {**{name: f"cannot: {why}" for name, why in found.cannot.items()}, **slow}


def _large(
    model: nn.Module, setting: str, dtype: torch.dtype, rounds: int, peers: Mapping[str, Make]
) -> tuple[Comparison, list[Figure]]:
    elements = count(model)
    # Live weights are read, shadows are read and written: 10 bytes an element of bfloat16, 12 of float32.
    bounds = {FLAT: flat_lerp(elements * (8 + dtype.itemsize) // 12)}
    held = elements * (dtype.itemsize + 4 + 8)
    # A peer may need as much again as its shadow, twice, while it works; but one at a time.
    together = max(1, (HELD_BYTES - held - 8 * elements) // (4 * elements))
    rounds = max(2, min(rounds, rounds * 50_000_000 // elements))
    found = compare(model, peers, bounds, rounds=rounds, together=together)
    fastest = found.fastest(peers)
    over_bound = ratio(found.times[OURS], found.times[FLAT])
    over_peer = Spread.of([1 / value for value in found.over_ours[fastest]])
    return found, [
        *figures(setting, found, bounds),
        Figure(setting, "ours / fastest peer", over_peer, target=Target(1.0), note=fastest),
        Figure(setting, "ours / one flat lerp_ over the same bytes", over_bound, target=Target(1.15)),
    ]
