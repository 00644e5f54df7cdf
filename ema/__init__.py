"""Exponential moving averages of a model's weights, for any training loop. Depends on torch only.

    shadow <- beta * shadow + (1 - beta) * live          after each optimizer step

A plain loop:

    >>> from ema import EMAConfig, ExponentialMovingAverage
    >>> average = ExponentialMovingAverage(model, EMAConfig(decay=0.999))        # doctest: +SKIP
    >>> for step, batch in enumerate(batches):                                   # doctest: +SKIP
    ...     loss(model, batch).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     average.update(model, iteration=step)

Evaluate the average in the live model. Afterwards the live weights are restored bit for bit:

    >>> with average.swapped_into(model):                                        # doctest: +SKIP
    ...     evaluate(model)

Or write it into another model, which may be sharded: `average.copy_to(other)`.

Use it as teacher inside the loss, without a second model; also between the student's forward and its backward:

    >>> target = average.forward(model, inputs)                                  # doctest: +SKIP
    >>> F.mse_loss(model(inputs), target).backward()                             # doctest: +SKIP

FSDP2: make the average after `fully_shard`. In mode `local_shard` each rank keeps the average of its own shard; this is
exact and needs no communication. The default mode keeps the whole average on every rank and needs one all-gather per
parameter in each update.

    >>> average = ExponentialMovingAverage(model, EMAConfig(mode="local_shard"))  # doctest: +SKIP

A bank keeps several averages, each with its own rule, dtype, device and start, and reads the weights once for all. Also
measure how far each is from the weights, with one all-reduce for any number of averages:

    >>> bank = EMABank(model, {                                                  # doctest: +SKIP
    ...     "0.99": EMAConfig(decay=0.99),
    ...     "power": EMAConfig(type="power", sigma_rel=0.05, start_iter=1000),
    ...     "slow": EMAConfig(decay=0.9999, device="cpu"),
    ... })
    >>> bank.update(model, iteration=step)                                       # doctest: +SKIP
    >>> with bank["slow"].swapped_into(model): ...                               # doctest: +SKIP
    >>> found = divergence(bank, model)                                          # doctest: +SKIP
    >>> found["0.99"].rel_l2, drift_slope(found)                                 # doctest: +SKIP

Warn of settings that have another effect than expected, before the run:

    >>> from ema import pitfalls
    >>> pitfalls({"0.9999": EMAConfig(decay=0.9999)}, 1000)                      # doctest: +SKIP

The shadow is on the device of the parameters. With `overlap=True` it is updated on a separate stream during the next
forward. With `device="cpu"` it is in host memory, and a thread updates it. Only code that reads the average waits.

If the optimizer skipped a step, the average must skip it too: `average.update(model, iteration=step, finite=flag)`. The
flag may be a tensor on the device; the host does not wait for it.

Saving: `average.state_dict()` returns a flat dict of tensors for `torch.save` or torch.distributed.checkpoint. It
contains counters and rule, so a resumed average equals an uninterrupted one. `state_dict(snapshot=True)` can be saved
while training continues. In `load_state_dict` all names must match; it also accepts a plain dict of names and tensors.

Your own rule is one function of the iterations since the start:

    >>> config = EMAConfig(rule="mine.slow")
    >>> average = ExponentialMovingAverage(model, config, rule=lambda t, config: 1 - 1 / t)       # doctest: +SKIP

Averages made after the run: `ema.posthoc` finds the coefficients that combine stored averages, or plain checkpoints,
into the average of another rule, and those by which merged checkpoints replace a decay of the learning rate.

This package does not decide when to evaluate, and it writes no files.

`ema.rules` explains the rules and their formulas, and `ema.EMAConfig` every setting. ema/BEHAVIOUR.md lists the
behaviour with its tests. Programs that read saved averages use `ema.state`, and put them into a model with `ema.swap`.
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
    from ema.walk import is_swapped

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
    "is_swapped": "ema.walk",
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
