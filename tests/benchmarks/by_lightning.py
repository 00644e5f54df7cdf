"""The same step by Lightning's Trainer."""

import copy
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.benchmarks.by_hand import Average, Gate, Side, adamw, next_token_loss, sampler_of
from trainer.build import Parts
from trainer.config.schema import Config
from trainer.protocols import Batch


class Module(lightning.LightningModule):
    """The model as Lightning wants it."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        super().__init__()
        self.model = model
        self._config = config

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return next_token_loss(self.model, batch["tokens"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.model, self._config)


class AverageAndGate(lightning.Callback):
    """The average after each step, then the gate."""

    def __init__(self, average: Average, gate: Gate) -> None:
        self._average, self._gate = average, gate

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        self._average.update()
        if self._gate():
            trainer.should_stop = True


def lightning_trainer(config: Config, parts: Parts) -> Side:
    """Lightning with all switched off that can be."""
    module = Module(copy.deepcopy(parts.network.module), config)
    parameters: list[Tensor] = list(module.model.parameters())
    average = Average(parameters)
    train: Any = parts.splits.train  # makes whole batches, as torch allows and its annotations do not know
    loader = DataLoader(train, batch_sampler=sampler_of(config, parts), collate_fn=lambda batch: batch)

    def loop(gate: Gate) -> None:
        trainer = lightning.Trainer(
            barebones=True,
            accelerator="gpu" if parameters[0].is_cuda else "cpu",
            devices=1,
            max_epochs=1,
            gradient_clip_val=config.trainer.max_grad_norm,
            callbacks=[AverageAndGate(average, gate)],
        )
        trainer.fit(module, loader)

    return Side(loop, lambda: parameters, lambda: average.shadow)
