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

Several averages over one look at the weights, and how far each is from them (one all-reduce):

    >>> bank = EMABank(model, {"0.99": EMAConfig(decay=0.99), "power": EMAConfig(type="power")})  # doctest: +SKIP
    >>> bank.update(model, iteration=step)                                       # doctest: +SKIP
    >>> divergence(bank, model)["0.99"].rel_l2                                   # doctest: +SKIP

Saving: `average.state_dict()` is a flat dict of tensors for `torch.save` or torch.distributed.checkpoint; counters and
rule are in it, so a resumed average equals an uninterrupted one. `load_state_dict` is strict.

A rule of your own is one function of the iteration since the start:

    >>> config = EMAConfig(rule="mine.slow")
    >>> average = ExponentialMovingAverage(model, config, rule=lambda t, config: 1 - 1 / t)       # doctest: +SKIP

What this package does not do: decide when to evaluate, write files, or move shadows off the model's device.

Rules and their formulas are in `ema.rules`, every setting in `ema.EMAConfig`. Importing `ema`, `ema.config` or
`ema.rules` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ema.config import EMAConfig

if TYPE_CHECKING:
    from ema.average import ExponentialMovingAverage
    from ema.bank import EMABank
    from ema.batchnorm import reestimate_batchnorm
    from ema.distance import Divergence, divergence
    from ema.swap import is_swapped

__all__ = [
    "Divergence",
    "EMABank",
    "EMAConfig",
    "ExponentialMovingAverage",
    "divergence",
    "is_swapped",
    "reestimate_batchnorm",
]

_HOMES = {
    "Divergence": "ema.distance",
    "EMABank": "ema.bank",
    "ExponentialMovingAverage": "ema.average",
    "divergence": "ema.distance",
    "is_swapped": "ema.swap",
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
