"""One face for every implementation, so that a scenario is written once and run against ours and against each peer.

Each `Loop` makes an average of a model at one constant decay, warm-ups switched off where the peer allows it, absorbs
after a step, and publishes into another model in the way that the peer's documentation shows.
"""

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ema import EMAConfig, ExponentialMovingAverage


class Loop:
    """An average as a training loop sees it.

    Args:
        model: live.
        decay: constant.
        start: first step that counts; a loop around a peer without such an option does not call it before.
        every: steps per update, by the peer's own option; without one the loop calls it at these steps only.
    """

    name = ""
    needs = "torch"

    def __init__(self, model: nn.Module, decay: float = 0.5, *, start: int = 0, every: int = 1) -> None:
        self.model, self.decay, self.start, self.every = model, decay, start, every
        self.step = -1
        self.made = self.make()

    def make(self) -> Any:
        raise NotImplementedError

    def absorb(self) -> None:
        """After an optimizer step: the next one, or the same one again with `again`."""
        self.step += 1
        if self.step >= self.start and (self.step - self.start) % self.every == 0:
            self.update()

    def again(self) -> None:
        """A second call for the step that was absorbed last."""
        self.update()

    def update(self) -> None:
        raise NotImplementedError

    def publish(self, target: nn.Module) -> None:
        raise NotImplementedError

    def save(self) -> Any:
        return self.made.state_dict()

    def load(self, state: Any) -> None:
        self.made.load_state_dict(state)

    def held(self) -> int:
        """Elements of floating-point tensors that the average keeps for itself."""
        raise NotImplementedError


class Ours(Loop):
    name = "ours"

    def make(self) -> ExponentialMovingAverage:
        return ExponentialMovingAverage(
            self.model, EMAConfig(decay=self.decay, start_iter=self.start, update_every=self.every)
        )

    def absorb(self) -> None:
        self.step += 1
        self.update()

    def update(self) -> None:
        self.made.update(self.model, iteration=self.step)

    def publish(self, target: nn.Module) -> None:
        self.made.copy_to(target)

    def save(self) -> Any:
        return self.made.state_dict(snapshot=True)

    def held(self) -> int:
        return sum(t.numel() for t in self.made.state_dict().values() if t.is_floating_point())


class Torch(Loop):
    """`torch.optim.swa_utils.AveragedModel` with its own exponential function."""

    name = "torch AveragedModel"
    use_buffers = False

    def make(self) -> Any:
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        return AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(self.decay), use_buffers=self.use_buffers
        )

    def update(self) -> None:
        self.made.update_parameters(self.model)

    def publish(self, target: nn.Module) -> None:
        target.load_state_dict(self.made.module.state_dict())

    def held(self) -> int:
        return sum(p.numel() for p in self.made.parameters())


class TorchBuffers(Torch):
    """The same with `use_buffers=True`."""

    name = "torch AveragedModel(use_buffers=True)"
    use_buffers = True


class EmaPytorch(Loop):
    """lucidrains' ema-pytorch; `min_value` at `beta` switches its warm-up off."""

    name = "ema-pytorch"
    needs = "ema_pytorch"

    def make(self) -> Any:
        from ema_pytorch import EMA

        return EMA(
            self.model,
            beta=self.decay,
            min_value=self.decay,
            update_after_step=self.start,
            update_every=self.every,
        )

    def absorb(self) -> None:
        self.step += 1
        self.update()

    def update(self) -> None:
        self.made.update()

    def publish(self, target: nn.Module) -> None:
        target.load_state_dict(self.made.ema_model.state_dict())

    def held(self) -> int:
        return sum(p.numel() for p in self.made.ema_model.parameters())


class Diffusers(Loop):
    """diffusers' `EMAModel`; `min_decay` at `decay` switches its warm-up off."""

    name = "diffusers EMAModel"
    needs = "diffusers"

    def make(self) -> Any:
        from diffusers.training_utils import EMAModel

        return EMAModel(
            self.model.parameters(), decay=self.decay, min_decay=self.decay, update_after_step=self.start
        )

    def absorb(self) -> None:
        self.step += 1
        if self.step % self.every == 0:
            self.update()

    def update(self) -> None:
        self.made.step(self.model.parameters())

    def publish(self, target: nn.Module) -> None:
        self.made.copy_to(target.parameters())

    def held(self) -> int:
        return sum(p.numel() for p in self.made.shadow_params)


class TorchEma(Loop):
    """torch-ema with its warm-up off."""

    name = "torch-ema"
    needs = "torch_ema"

    def make(self) -> Any:
        from torch_ema import ExponentialMovingAverage as Peer

        return Peer(self.model.parameters(), decay=self.decay, use_num_updates=False)

    def update(self) -> None:
        self.made.update()

    def publish(self, target: nn.Module) -> None:
        self.made.copy_to(target.parameters())

    def held(self) -> int:
        return sum(p.numel() for p in self.made.shadow_params)


class Lightning(Loop):
    """Lightning's `EMAWeightAveraging`, its hooks called in the order in which the Trainer calls them."""

    name = "Lightning EMAWeightAveraging"
    needs = "lightning"

    def make(self) -> Any:
        from lightning.pytorch import LightningModule
        from lightning.pytorch.callbacks import EMAWeightAveraging

        self.module = LightningModule()
        self.module.net = self.model
        callback = EMAWeightAveraging(
            decay=self.decay, update_starting_at_step=self.start, update_every_n_steps=self.every
        )
        callback.setup(SimpleNamespace(), self.module, "fit")  # type: ignore[arg-type]
        return callback

    def absorb(self) -> None:
        self.step += 1
        self.update()

    def update(self) -> None:
        trainer = SimpleNamespace(global_step=self.step + 1)
        self.made.on_train_batch_end(trainer, self.module, None, None, self.step)

    def publish(self, target: nn.Module) -> None:
        """What a validation epoch sees."""
        self.made.on_validation_epoch_start(None, self.module)
        target.load_state_dict(self.model.state_dict())
        self.made.on_validation_epoch_end(None, self.module)

    def save(self) -> Any:
        checkpoint: dict[str, Any] = {"state_dict": self.module.state_dict()}
        self.made.on_save_checkpoint(None, self.module, checkpoint)
        return checkpoint, self.made.state_dict()

    def load(self, state: Any) -> None:
        checkpoint, callback = state
        self.made.load_state_dict(callback)
        self.made.on_load_checkpoint(None, self.module, checkpoint)

    def held(self) -> int:
        return sum(p.numel() for p in self.made._average_model.parameters())


PEERS: dict[str, type[Loop]] = {
    "torch": Torch,
    "torch_buffers": TorchBuffers,
    "ema_pytorch": EmaPytorch,
    "diffusers": Diffusers,
    "torch_ema": TorchEma,
    "lightning": Lightning,
}
Scenario = Callable[[type[Loop]], Any]


def peer_or_skip(key: str) -> type[Loop]:
    """The peer's loop, or a skip that says which package is missing."""
    peer = PEERS[key]
    if find_spec(peer.needs) is None:
        pytest.skip(f"{peer.name} is not installed ({peer.needs})")
    return peer


def outcome(scenario: Scenario, loop: type[Loop]) -> Any:
    """What a scenario gives, or the name of what it raises."""
    try:
        return scenario(loop)
    except (Exception, SystemExit) as error:
        return type(error).__name__


def compare(scenario: Scenario, right: Any, peer: str, known: Any) -> None:
    """Assert that ours gives `right`, and that the peer still gives what the table of behaviour says of it."""
    loop = peer_or_skip(peer)
    found = outcome(scenario, Ours)
    assert found == _close(right), f"ours gives {found!r}, expected {right!r}"
    theirs = outcome(scenario, loop)
    assert theirs == _close(known), (
        f"{loop.name} gives {theirs!r} where it gave {known!r} (right is {right!r}): "
        "it changed, and ema/BEHAVIOUR.md needs a new line"
    )


def _close(value: Any) -> Any:
    if isinstance(value, float | list):
        return pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True)
    return value


@torch.no_grad()
def fill(model: nn.Module, value: float) -> None:
    """Every parameter becomes `value`, in place, as an optimizer writes."""
    for parameter in model.parameters():
        parameter.fill_(value)


def scalar(value: float = 0.0) -> nn.Linear:
    """A model of one weight."""
    model = nn.Linear(1, 1, bias=False)
    fill(model, value)
    return model


def evaluate(loop: Loop, inside: Any) -> None:
    """An evaluation under the average, in the way each implementation documents."""
    if isinstance(loop, Ours):
        with loop.made.swapped_into(loop.model):
            inside(loop)
    elif isinstance(loop, TorchEma):
        with loop.made.average_parameters():
            inside(loop)
    elif isinstance(loop, Diffusers):
        loop.made.store(loop.model.parameters())
        loop.made.copy_to(loop.model.parameters())
        inside(loop)
        loop.made.restore(loop.model.parameters())
    elif isinstance(loop, Lightning):
        loop.made.on_validation_epoch_start(None, loop.module)
        inside(loop)
        loop.made.on_validation_epoch_end(None, loop.module)
    else:
        raise TypeError(f"{loop.name} evaluates a model of its own")
