"""The weights that an average gives to the weights of each step, read off an average of the training loop.

The only parameter of the model is a unit vector: e_0 at first, e_t after step t, which is exact. So an average *is* its
row of weights, which must be `ema.rules.profile`.
"""

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ema import EMABank, EMAConfig
from ema.rules import Rule, profile
from trainer.config.schema import TrainerConfig
from trainer.distributed.sharding import Network
from trainer.loop.fit import Callbacks, Run, fit
from trainer.optimizers.steps import note_start
from trainer.protocols import Batch

UPDATES, STEPS = 24, 512
"""Updates of an average; fewer, but at least two, if they take more than this number of steps."""
TOLERANCES = {"float64": 1e-12, "float32": 1e-6}
"""Largest difference of a weight, by the dtype of the average."""


class Unit(nn.Module):
    """A model whose only parameter is the unit vector e_0, of a `size` one larger than the number of steps."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(1, size)[0].clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return one number a sample, which depends on the parameter."""
        return (x * self.weight).sum(1)


class Next(torch.optim.Optimizer):
    """An optimizer whose step turns e_t into e_(t+1)."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the one of each parameter to the next place."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(parameter.roll(1))


class Sum:
    """A task whose loss is the output of the model; the loop needs no more of it."""

    def losses(self, model: nn.Module, batch: Batch, random: object) -> Tensor:
        """Return the output of the model."""
        output: Tensor = model(batch["x"])
        return output.float()


class _Silent:
    """Receiver of what the loop measures and shows, which keeps none of it."""

    def before(self, run: Run) -> None:
        """Do nothing."""

    def __call__(self, run: Run, loss: Tensor, grad_norm: Tensor) -> dict[str, float]:
        """Measure nothing."""
        return {}

    def update(self, step: int) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""


def deviation(average: EMAConfig, rule: Rule | None, steps: int, device: torch.device) -> float:
    """Return the largest difference between the weights that the loop's average has and its `profile`.

    The loop begins shortly before the average starts, and ends with the run or after `UPDATES` updates.

    Args:
        average: settings of the average in the run.
        rule: the user's own rule, if the average has one.
        steps: steps of the run.
        device: device of the live weights.
    """
    every = average.update_every
    end = min(steps, average.start_iter + every * min(UPDATES, max(2, STEPS // every)))
    begin = max(0, min(average.start_iter, end) - 2)
    found = _realised(average, rule, begin, end, device)
    expected = torch.tensor(profile(average, end, rule)[begin:], dtype=torch.float64)
    return float((found - expected).abs().max())


def tolerance(average: EMAConfig) -> float:
    """Return the largest difference of a weight that the dtype of the average explains."""
    name = average.dtype or "float32"
    return TOLERANCES.get(name) or UPDATES * torch.finfo(getattr(torch, name)).eps


def _realised(average: EMAConfig, rule: Rule | None, begin: int, end: int, device: torch.device) -> Tensor:
    """Return the average after the steps from `begin` to `end`, float64 `[end - begin + 1]` on the CPU."""
    module = Unit(end - begin + 1).to(device)
    own = replace(average, mode="full_tensor", include=[], exclude=[], average_buffers=[])
    optimizer = Next(module.parameters(), lr=1.0)
    note_start(optimizer, 1.0)
    bank = EMABank(module, {"own": own}, rules={} if rule is None else {"own": rule})
    silent: Any = _Silent()
    task: Any = Sum()
    run = Run(
        config=TrainerConfig(
            steps=end, global_batch_size=1, log_every=end, eval_every=end, save_every=0, max_grad_norm=0
        ),
        network=Network(module, module, None, device),
        task=task,
        batches=_ones(device),
        random=lambda step, micro: None,  # type: ignore[arg-type,return-value]
        reseed=lambda step: None,
        optimizer=optimizer,
        peak_lr=1.0,
        lr_factor=lambda step: 1.0,
        bank=bank,
        measure=silent,
        skipped=torch.zeros((), dtype=torch.int64, device=device),
        step=begin,
    )
    callbacks = Callbacks(
        evaluate=lambda network, bank: {},
        logger=silent,
        display=silent,
        save=lambda run, last: None,
        stop_requested=lambda: False,
    )
    fit(run, callbacks)
    return bank["own"].state_dict()["weight"].detach().cpu().double()


def _ones(device: torch.device) -> Generator[Batch, None, None]:
    while True:
        yield {"x": torch.ones(1, 1, device=device)}
