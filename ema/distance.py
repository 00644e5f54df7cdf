"""Measure how far averages are from the live weights, and how far an optimizer step moved the live weights.

Each rank sums over its own shards. One small all-reduce adds up the sums of all ranks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema import rules
from ema.average import ExponentialMovingAverage
from ema.bank import EMABank
from ema.memory import local
from ema.shards import part_for
from ema.squares import block_sums
from ema.state import raise_for_names
from ema.track import Track
from ema.walk import Walk

SETTLED = 3
"""Number of horizons for which a decay must have been constant before an average counts as settled.

Then its distance depends on the weights and not on the start: the squared distance of a drift is (1 - e^-3)^2 = 0.9 of
its limit, and the slope over several decays is right to 0.05."""


@dataclass(frozen=True)
class Divergence:
    """The distance of an average M from the live weights theta, over the parameters that the average tracks."""

    rel_l2: float
    """|M - theta| / |theta|."""
    cosine: float
    """Cosine of the angle between M and theta."""
    decay: float
    """The same as `ExponentialMovingAverage.decay`."""
    blocks: dict[str, float] = field(default_factory=dict)
    """rel_l2 of each block of parameters."""
    live_norm: float = 0.0
    """|theta|."""
    horizon: float | None = None
    """Iterations that the average remembers: 1 / (1 - beta), where beta is the decay per iteration also if
    `update_every` is larger than 1. None until the decay has been constant (to 1 %) for three horizons."""


class LiveCopy:
    """A copy of the live weights, which `divergence` compares with later live weights (see `live_copy`)."""

    started = True
    decay = 0.0

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.shadows = {
            slot.name: local(slot.tensor).detach().clone()
            for slot in walk.params.values()
            if slot.tensor.requires_grad and (slot.tensor.is_floating_point() or slot.tensor.is_complex())
        }


@torch.no_grad()
def live_copy(averages: ExponentialMovingAverage | EMABank, model: nn.Module) -> LiveCopy:
    """Copy the live weights, to measure after the optimizer's step how far it moved them:

        >>> before = live_copy(bank, model)                                      # doctest: +SKIP
        >>> optimizer.step()                                                     # doctest: +SKIP
        >>> divergence({"step": before}, model)["step"].rel_l2                   # doctest: +SKIP

    The result is |theta_t - theta_(t-1)| / |theta_t|. To measure the averages in the same call, use
    `divergence({**bank, "step": before}, model)`.

    Args:
        averages: an average or a bank, whose walk over the model is used; the bank may be empty.
        model: the live model, wrapped or not.

    Memory: a copy of this rank's part of all trainable parameters. Collectives: none; the host does not wait.

    Raises:
        RuntimeError: An average is swapped into the model.
        KeyError, ValueError: The model has other parameters than the averages.
    """
    bank = averages.values() if isinstance(averages, EMABank) else [averages]
    walk = averages.walk if isinstance(averages, EMABank) else averages.track.walk
    return LiveCopy(_refreshed(walk, [average.track for average in bank], model))


@torch.no_grad()
def divergence(
    averages: Mapping[str, ExponentialMovingAverage | LiveCopy],
    model: nn.Module,
    *,
    block_of: Callable[[str], str] | None = None,
) -> dict[str, Divergence]:
    """Measure the distances of all averages from the live weights of `model`.

    An average that has not started counts as equal to the live weights: rel_l2 0, cosine 1. Sums are in float64. The
    sum over the live weights is computed once for all averages that track the same parameters.

    Args:
        averages: a bank, or averages by name; copies of earlier live weights may be among them.
        model: the live model, wrapped or not.
        block_of: a function from a canonical parameter name to its block; `block_name` if None.

    Collectives: one all-reduce of one float64 tensor if torch.distributed is initialised. The host waits once. Memory:
    a few MB on a CPU, about 100 MB on other devices, and copies of the largest tensor if it is not contiguous.

    Raises:
        RuntimeError: An average is swapped into the model, or an update of an average failed midway.
        KeyError, ValueError: The model has other parameters than the averages, or other shapes.
    """
    if not averages:
        return {}
    tracks = {name: one if isinstance(one, LiveCopy) else one.track for name, one in averages.items()}
    walk = _refreshed(next(iter(tracks.values())).walk, list(tracks.values()), model)
    for average in averages.values():
        if isinstance(average, ExponentialMovingAverage):
            average.wait()
            average.track.refuse_torn()
    cohorts = _by_parameters(tracks)
    tables: list[tuple[list[str], Tensor]] = []
    for names, members in cohorts.items():
        started = [partial(_parts, tracks[name], walk) for name in members if tracks[name].started]
        tables.append(block_sums(walk, names, started, block_of or block_name))
    sums = iter(_reduced([table for _, table in tables]))
    found: dict[str, Divergence] = {}
    for (blocks, _), members in zip(tables, cohorts.values(), strict=True):
        live, *columns = next(sums)
        pairs = iter(columns)
        for name in members:
            pair = (next(pairs), next(pairs)) if tracks[name].started else ([0.0] * len(live), live)
            found[name] = _divergence(tracks[name], blocks, (pair[0], live, pair[1]))
    return {name: found[name] for name in averages}


def drift_slope(found: Mapping[str, Divergence]) -> float | None:
    """Return the slope of log |M - theta|^2 over log 1 / (1 - beta), fitted by least squares.

    The slope shows how the weights move:

    * 2: the weights drift; a longer average is further behind.
    * 1: the weights diffuse, as in a random walk.
    * 0: the weights are stationary, with noise around a point; a longer average is safe.

    If the increments are iid with mean m and variance v, the squared distance is m^2 b^2 / (1-b)^2 + v b^2 / (1-b^2).
    For white noise around a point it is 2 v b^2 / (1+b). These give the slopes above for long horizons. From decay 0.9
    to 0.99 the slopes are up to 0.1 larger. A slope in between means a mixture, or a change that affects only some of
    the horizons.

    Only averages with a `Divergence.horizon` are used. The distance of the others still grows from the start, for any
    weights. The averages must track the same parameters; if there are several such groups, the largest is used.

    Args:
        found: what `divergence` returned.

    Returns:
        The slope, or None unless at least two averages that differ from the live weights have horizons that differ by
        1 % or more.
    """
    groups: dict[float, list[tuple[float, float]]] = {}
    for one in found.values():
        # Averages of the same parameters have exactly the same |theta|, because it is computed once for all of them.
        if one.horizon is not None and 0 < one.rel_l2 < math.inf:
            point = math.log(one.horizon), 2 * math.log(one.rel_l2 * one.live_norm)
            groups.setdefault(one.live_norm, []).append(point)
    points = max(groups.values(), key=len, default=[])
    if not points or max(x for x, _ in points) - min(x for x, _ in points) < math.log(1.01):
        return None
    mean_x, mean_y = (math.fsum(axis) / len(points) for axis in zip(*points, strict=True))
    covariance = math.fsum((x - mean_x) * (y - mean_y) for x, y in points)
    return covariance / math.fsum((x - mean_x) ** 2 for x, _ in points)


def block_name(name: str) -> str:
    """Return the block of a parameter: `blocks.3` for `blocks.3.attention.weight`, `head` for `head.weight`."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]


def _refreshed(walk: Walk, tracks: Sequence[Track | LiveCopy], model: nn.Module) -> Walk:
    version = walk.version
    with walk.kept_on_error():
        walk.follow(model, "measure the divergence")
        for track in tracks:
            if not isinstance(track, Track):
                continue
            if track.walk is not walk:
                missing = [name for name in track.coverage.averaged if name not in walk.by_name]
                raise_for_names(missing=missing, unexpected=[], where="the model")
            elif walk.version != version:
                track.fit()
    return walk


def _by_parameters(tracks: Mapping[str, Track | LiveCopy]) -> dict[tuple[str, ...], list[str]]:
    """Group the names of averages by the parameters that they track."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, track in tracks.items():
        averaged = tuple(track.shadows) if isinstance(track, LiveCopy) else track.coverage.averaged
        groups.setdefault(averaged, []).append(name)
    return groups


def _parts(track: Track | LiveCopy, walk: Walk, names: list[str]) -> list[Tensor]:
    """Return the parts of an average that match this rank's parts of the live weights."""
    tensors = [track.shadows[name] for name in names]
    if isinstance(track, LiveCopy):
        return tensors
    lives = [walk.by_name[name].tensor for name in names]
    if {type(tensor) for tensor in (*lives, *tensors)} <= {Tensor, nn.Parameter}:
        return tensors
    return [part_for(live, tensor) for live, tensor in zip(lives, tensors, strict=True)]


def _reduced(tables: Sequence[Tensor]) -> list[list[list[float]]]:
    """Add up each table over all ranks and return its columns."""
    home = tables[0].device
    flat = torch.cat([table.t().reshape(-1).to(home) for table in tables])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(flat)
    values = iter(flat.tolist())
    return [[list(islice(values, table.shape[0])) for _ in range(table.shape[1])] for table in tables]


def _divergence(track: Track | LiveCopy, blocks: list[str], sums: tuple[list[float], ...]) -> Divergence:
    total = [math.fsum(column) for column in sums]
    return Divergence(
        rel_l2=_rel_l2(total[0], total[1]),
        cosine=_cosine(*total),
        decay=track.decay,
        blocks=dict(zip(blocks, map(_rel_l2, sums[0], sums[1]), strict=True)),
        live_norm=math.sqrt(total[1]),
        horizon=None if isinstance(track, LiveCopy) else _horizon(track),
    )


def _horizon(track: Track) -> float | None:
    t, every = track.last_due(), track.config.update_every
    now = rules.gain(track.config, t, track.rule) if t > 0 else 0.0
    if now <= 0:
        return None
    horizon = 1.0 if now == 1 else -1 / math.expm1(math.log1p(-now) / every)
    earlier = t - round(SETTLED * horizon / every) * every
    if earlier < every or not math.isclose(rules.gain(track.config, earlier, track.rule), now, rel_tol=0.01):
        return None
    return horizon


def _rel_l2(difference: float, live: float) -> float:
    if live == 0:
        return math.inf if difference > 0 else 0.0
    return math.sqrt(difference / live)


def _cosine(difference: float, live: float, average: float) -> float:
    # Computed from the summed squares of the difference, which stays exact for nearly equal tensors.
    if live == 0 or average == 0:
        return 1.0 if live == average else 0.0
    cosine = (live + average - difference) / (2 * math.sqrt(live * average))
    return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))
