"""Tasks for the tests of a training step, and how a wait for the device is made an error."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.protocols import Batch, SampleRandom
from trainer.tasks.language_modeling import LanguageModeling


def forbid_waiting(forbidden: bool) -> None:
    """Make every wait of the host for the device an error, or allow it; without effect where no card is."""
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error" if forbidden else "default")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Context in which the host must not wait for the device."""
    forbid_waiting(True)
    try:
        yield
    finally:
        forbid_waiting(False)


class Watched(LanguageModeling):
    """Forbids to wait for the device from the 5th to the 9th micro-batch, all that happens in between included."""

    count = 0

    def losses(self, model: nn.Module, batch: Batch, random: SampleRandom) -> Tensor:
        if model.training:
            self.count += 1
            forbid_waiting(5 <= self.count <= 9)
        return super().losses(model, batch, random)


class Faulty(LanguageModeling):
    """The loss of the 5th micro-batch is infinite."""

    count = 0

    def losses(self, model: nn.Module, batch: Batch, random: SampleRandom) -> Tensor:
        self.count += model.training
        factor = float("inf") if model.training and self.count == 5 else 1.0
        return super().losses(model, batch, random) * factor
