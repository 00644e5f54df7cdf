"""Exponential moving averages of a network's weights, for any training loop. Needs torch and nothing else.

    shadow <- beta * shadow + (1 - beta) * live          after each optimizer step

A plain loop:

    >>> from ema import EMAConfig, ExponentialMovingAverage
    >>> average = ExponentialMovingAverage(model, EMAConfig(decay=0.999))        # doctest: +SKIP
    >>> for step, batch in enumerate(batches):                                   # doctest: +SKIP
    ...     loss(model, batch).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     average.update(model, iteration=step)

Evaluate the average in the live model's place; the live weights come back bit for bit:

    >>> with average.swapped_into(model):                                        # doctest: +SKIP
    ...     evaluate(model)

Or publish it into another model, sharded or not: `average.copy_to(other)`.

FSDP2: make the average after `fully_shard`, and let each rank keep the average of its own shard, which is exact
and costs no communication (the default mode keeps the whole average on every rank, one all-gather a parameter):

    >>> average = ExponentialMovingAverage(model, EMAConfig(mode="local_shard"))  # doctest: +SKIP

Several averages over one look at the weights, each with its own rule, dtype, place and start; and how far each is from
the weights (one all-reduce, whatever their number):

    >>> bank = EMABank(model, {                                                  # doctest: +SKIP
    ...     "0.99": EMAConfig(decay=0.99),
    ...     "power": EMAConfig(type="power", sigma_rel=0.05, start_iter=1000),
    ...     "slow": EMAConfig(decay=0.9999, device="cpu"),
    ... })
    >>> bank.update(model, iteration=step)                                       # doctest: +SKIP
    >>> with bank["slow"].swapped_into(model): ...                               # doctest: +SKIP
    >>> found = divergence(bank, model)                                          # doctest: +SKIP
    >>> found["0.99"].rel_l2, drift_slope(found)                                 # doctest: +SKIP

What is easy to miss about a choice, before it costs a run:

    >>> from ema import pitfalls
    >>> pitfalls({"0.9999": EMAConfig(decay=0.9999)}, 1000)                      # doctest: +SKIP

Where the shadow lives: with the parameters; with `overlap=True` updated on a stream of its own during the next forward;
with `device="cpu"` in host memory, updated there by a thread. Only code that reads an average waits for it.

A step that the optimizer skipped must not be absorbed: `average.update(model, iteration=step, finite=flag)`, where the
flag may be a tensor on the device, for which nothing waits.

Saving: `average.state_dict()` is a flat dict of tensors for `torch.save` or torch.distributed.checkpoint; counters and
rule are in it, so a resumed average equals an uninterrupted one. `state_dict(snapshot=True)` may be saved while
training goes on. `load_state_dict` is strict, and also reads a plain dict of names and tensors.

A rule of your own is one function of the iteration since the start:

    >>> config = EMAConfig(rule="mine.slow")
    >>> average = ExponentialMovingAverage(model, config, rule=lambda t, config: 1 - 1 / t)       # doctest: +SKIP

What this package does not do: decide when to evaluate, and write files.

Rules and their formulas are in `ema.rules`, every setting in `ema.EMAConfig`, the promised behaviour with its tests in
ema/BEHAVIOUR.md. Programs that read saved averages use `ema.state`, and put them into a model with `ema.swap`.
Importing `ema`, `ema.config`, `ema.rules` or `ema.advice` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ema.config import EMAConfig

if TYPE_CHECKING:
    from ema.advice import pitfalls
    from ema.average import ExponentialMovingAverage
    from ema.bank import EMABank
    from ema.batchnorm import reestimate_batchnorm
    from ema.distance import Divergence, LiveCopy, divergence, drift_slope, live_copy
    from ema.swap import is_swapped

__all__ = [
    "Divergence",
    "EMABank",
    "EMAConfig",
    "ExponentialMovingAverage",
    "LiveCopy",
    "divergence",
    "drift_slope",
    "is_swapped",
    "live_copy",
    "pitfalls",
    "reestimate_batchnorm",
]

_HOMES = {
    "Divergence": "ema.distance",
    "EMABank": "ema.bank",
    "ExponentialMovingAverage": "ema.average",
    "LiveCopy": "ema.distance",
    "divergence": "ema.distance",
    "drift_slope": "ema.distance",
    "is_swapped": "ema.swap",
    "live_copy": "ema.distance",
    "pitfalls": "ema.advice",
    "reestimate_batchnorm": "ema.batchnorm",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ema' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
