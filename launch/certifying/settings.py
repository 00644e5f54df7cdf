"""Settings of the short runs that a certificate compares, made from those of the run."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from trainer.config.schema import Config, LoggerConfig, OptimizerConfig, ScheduleConfig

SAMPLES = 16
"""Most samples of an evaluation of the short runs."""
PROCESSES = 2
"""Processes of the sharded run."""
MUON = ("torch.optim.Muon", "trainer.optimizers.muon.Muon")
"""Optimizers whose `eps` is the least norm by which the gradient of a matrix is divided."""
MUON_EPS = 1e3
"""Value of that `eps`, far above the norms of gradients, so that the update is nearly linear in the gradient. With a
smaller one Muon makes directions in which the gradient has only rounding errors as long as all others."""


def short(config: Config, steps: int) -> Config:
    """Return the settings of a short run in one process, which saves after each step and evaluates after the last.

    Each average begins early and is updated often enough to take part in so few steps.
    """
    trainer = dataclasses.replace(
        config.trainer,
        steps=steps,
        log_every=steps,
        eval_every=steps,
        eval_samples=config.trainer.samples_of(SAMPLES),
        sample_grids=False,
        save_every=1,
        keep_checkpoints=steps,
        async_save=False,
        on_checkpoint=None,
    )
    own = {name: {**fields, **_early(fields, steps)} for name, fields in (config.ema.averages or {}).items()}
    ema = dataclasses.replace(
        config.ema,
        **_early(vars(config.ema), steps),
        averages=own,
        snapshots=0,
        batchnorm_batches=min(config.ema.batchnorm_batches, 2),
    )
    sharding = dataclasses.replace(config.sharding, _target_=None, args={}, strategy="none", replicate=1)
    return dataclasses.replace(
        config,
        fork=None,
        init_from=None,
        init=type(config.init)(),
        metrics={},
        callbacks={},
        logger=LoggerConfig(name="none"),
        trainer=trainer,
        ema=ema,
        sharding=sharding,
    )


def unsharded(config: Config, steps: int, eps: float) -> Config:
    """Return the settings of the short run with which the sharded run is compared, on the CPU in full precision.

    Its micro-batches are those of both ranks, one after the other: BatchNorm makes each depend on its samples. The
    learning rate is constant. The `eps` of the optimizer is not below the size of a usual gradient. Otherwise Adam
    divides the rounding errors of gradients that are almost 0 by these gradients. Muon gets `MUON_EPS`.

    Args:
        config: configuration of the run.
        steps: steps of the short run.
        eps: least value of the argument `eps` of optimizers that have it.
    """
    alone = short(config, steps)
    accumulate = PROCESSES * config.trainer.accumulate
    return dataclasses.replace(
        alone,
        trainer=dataclasses.replace(alone.trainer, accumulate=accumulate, device="cpu"),
        schedule=ScheduleConfig(),
        optimizer=_damped(config.optimizer, eps),
        sharding=dataclasses.replace(
            alone.sharding, param_dtype=None, reduce_dtype=None, compile=False, activation_checkpointing=False
        ),
    )


def sharded(config: Config, steps: int, eps: float) -> Config:
    """Return the settings of the same run with the model sharded over `PROCESSES` ranks; arguments as `unsharded`.

    The user's own function shards if the run has one, else FSDP.
    """
    whole = reordered(config, steps, eps)
    own = config.sharding._target_
    sharding = dataclasses.replace(
        whole.sharding,
        _target_=own,
        args=config.sharding.args,
        strategy="none" if own else "fsdp",
        replicate=config.sharding.replicate if own else 1,
    )
    return dataclasses.replace(whole, sharding=sharding)


def reordered(config: Config, steps: int, eps: float) -> Config:
    """Return the settings of `unsharded` with micro-batches twice as large; arguments as there.

    Unless a sample depends on others of its micro-batch, only the order of sums differs.
    """
    whole = unsharded(config, steps, eps)
    trainer = dataclasses.replace(whole.trainer, accumulate=config.trainer.accumulate)
    return dataclasses.replace(whole, trainer=trainer)


def _early(fields: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the changes to an average's fields by which it starts and is updated within `steps`."""
    start, every = fields.get("start_iter", 0), fields.get("update_every", 1)
    changed: dict[str, Any] = {}
    if not isinstance(start, float) and start > 1:
        changed["start_iter"] = 1
    if 2 * every > steps:
        changed["update_every"] = 1
    return changed


def _damped(optimizer: OptimizerConfig, eps: float) -> OptimizerConfig:
    """Return the settings of an optimizer with `eps` at least this large, where its arguments have one number of it."""
    groups = {
        name: {**fields, "args": _with_eps(fields.get("args") or {}, _class_of(fields), eps)}
        for name, fields in optimizer.groups.items()
    }
    args = dict(optimizer.args)
    if optimizer._target_ is None:
        of_torch = inspect.signature(getattr(torch.optim, optimizer.name)).parameters.get("eps")
        if of_torch is not None:
            args.setdefault("eps", of_torch.default)
    return dataclasses.replace(
        optimizer, args=_with_eps(args, _class_of(vars(optimizer)), eps), groups=groups
    )


def _class_of(fields: Mapping[str, Any]) -> str:
    return fields.get("_target_") or f"torch.optim.{fields.get('name')}"


def _with_eps(args: Mapping[str, Any], kind: str, eps: float) -> dict[str, Any]:
    if kind in MUON:
        return {**args, "eps": MUON_EPS}
    own = args.get("eps")
    return {**args, "eps": max(own, eps)} if isinstance(own, float) else dict(args)
