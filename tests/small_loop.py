"""A training loop over one weight, whose steps are closed-form."""

from collections.abc import Callable

import torch
from torch import nn

from tests.makers import loop_run
from trainer.config.schema import OptimizerConfig, TrainerConfig
from trainer.loggers import Loggers
from trainer.loggers.progress import NullProgress
from trainer.loop.fit import Callbacks, Run, fit
from trainer.seeding import StepRandom


class Pull:
    """Loss (weight - x)^2 per sample: the gradient is closed-form."""

    def losses(self, model: nn.Module, batch: dict, random: StepRandom) -> torch.Tensor:
        return (model(torch.ones(len(batch["x"]), 1)).squeeze(1) - batch["x"]).square()

    def metrics(self, model: nn.Module, batch: dict, random: StepRandom) -> dict:
        return {"loss": self.losses(model, batch, random)}


class Recorder(Loggers):
    def __init__(self) -> None:
        super().__init__([])
        self.records: dict[int, dict] = {}

    def log(self, step: int, metrics: dict) -> None:
        self.records[step] = metrics


def make_run(xs: list[list[float]], **settings: object) -> Run:
    config = TrainerConfig(steps=len(xs), max_grad_norm=0.0, log_every=1, device="cpu")
    config = TrainerConfig(**{**vars(config), **settings})  # type: ignore[arg-type]
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    micro = [part for x in xs for part in torch.tensor(x).chunk(config.accumulate)]
    optimizer = OptimizerConfig(name="SGD", lr=0.25)
    return loop_run(config, module, Pull(), ({"x": x} for x in micro), optimizer, decay=0.5)


def train(
    run: Run,
    save: Callable[[Run, bool], object] = lambda run, last: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[int, dict]:
    """Train without evaluations; returns the logged records by step."""
    logger = Recorder()
    fit(run, Callbacks(lambda network, bank: {}, logger, NullProgress(), save, stop_requested))
    return logger.records
