"""The start, resuming, and what one step is, in every implementation. One weight, decay 1/2: numbers by hand."""

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ema import EMAConfig, ExponentialMovingAverage
from tests.peers.loops import Loop, compare, fill, scalar


def weight_of(loop: Loop) -> float:
    target = scalar(-1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop.publish(target)
    return float(target.weight.item())


def first_update(make: type[Loop]) -> float:
    """Constructed at 0, trained to 1, absorbed for the first time."""
    model = scalar(0.0)
    loop = make(model)
    fill(model, 1.0)
    loop.absorb()
    return weight_of(loop)


@pytest.mark.parametrize(
    ("peer", "known"),
    [("torch", 1.0), ("ema_pytorch", 1.0), ("diffusers", 1.0), ("lightning", 1.0), ("torch_ema", 0.5)],
)
def test_the_first_update_copies_the_live_weights(peer: str, known: Any) -> None:
    """torch-ema keeps the constructor's weights as the oldest ones of its average."""
    compare(first_update, 1.0, peer, known)


def before_the_start(make: type[Loop]) -> float:
    """Starts at step 100; published after step 5, when the live weight is 6."""
    model = scalar(0.0)
    loop = make(model, start=100, every=10)
    for step in range(6):
        fill(model, step + 1.0)
        loop.absorb()
    return weight_of(loop)


@pytest.mark.parametrize(
    ("peer", "known"),
    [("torch", 0.0), ("ema_pytorch", 1.0), ("diffusers", 1.0), ("lightning", 0.0), ("torch_ema", 0.0)],
)
def test_before_the_start_the_live_weights_are_published(peer: str, known: Any) -> None:
    """0 is the constructor's weight (Lightning#21724), 1 that of the last step that was looked at; live is 6."""
    compare(before_the_start, 6.0, peer, known)


def test_lightnings_trainer_validates_the_constructors_weights_before_the_start(tmp_path: Path) -> None:
    """Lightning#21724 with the real Trainer: after step 3 the live weight is 3, and its validation sees 0."""
    pytest.importorskip("lightning", reason="Lightning is not installed")
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import EMAWeightAveraging

    ours: list[float] = []
    theirs: list[float] = []

    class Counting(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = scalar(0.0)
            self.average = ExponentialMovingAverage(self.net, EMAConfig(start_iter=1000))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return -self.net.weight.sum()

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            self.average.update(self.net, iteration=index)
            target = scalar(-1.0)
            self.average.copy_to(target)
            ours.append(float(target.weight.item()))

        def validation_step(self, batch: Any, index: int) -> None:
            theirs.append(float(self.net.weight.item()))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model = Counting()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            max_steps=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=tmp_path,
            callbacks=[EMAWeightAveraging(update_starting_at_step=1000)],
        ).fit(model, DataLoader(torch.zeros(3)), DataLoader(torch.zeros(1)))
    assert ours == [1.0, 2.0, 3.0]
    assert theirs == [0.0], "mended: ema/BEHAVIOUR.md needs a new line"


def resumed(make: type[Loop]) -> float:
    """Largest difference between six steps at once and three, saved, loaded into fresh objects, three more."""

    def train(loop: Loop, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            with torch.no_grad():
                loop.model.weight.copy_(torch.randn(1, 7, generator=generator))
            loop.absorb()

    def model() -> nn.Linear:
        fresh = nn.Linear(7, 1, bias=False)
        fill(fresh, 0.0)
        return fresh

    whole, first, second = make(model(), 0.9), make(model(), 0.9), make(model(), 0.9)
    train(whole, range(6))
    train(first, range(3))
    state = copy.deepcopy(first.save())
    second.model.load_state_dict(first.model.state_dict())
    second.step = first.step
    second.load(state)
    train(second, range(3, 6))
    targets = model(), model()
    whole.publish(targets[0])
    second.publish(targets[1])
    return float((targets[0].weight - targets[1].weight).detach().abs().max())


@pytest.mark.parametrize("peer", ["torch", "ema_pytorch", "diffusers", "lightning", "torch_ema"])
def test_resumed_equals_uninterrupted(peer: str) -> None:
    """All of them are right about this one, at a constant decay and loaded into the same set-up."""
    compare(resumed, 0.0, peer, 0.0)


def resumed_with_another_decay(make: type[Loop]) -> str:
    """Saved at decay 0.9, loaded into an average of 0.5: is it said, and which of the two goes on?"""
    first = make(scalar(0.0), 0.9)
    first.absorb()
    second = make(scalar(0.0), 0.5)
    second.absorb()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        second.load(copy.deepcopy(first.save()))
    second.step = first.step
    fill(second.model, 1.0)
    second.absorb()
    said = "said" if any("decay" in str(warning.message) for warning in caught) else "silent"
    return f"{said}, {weight_of(second):.2f}"


@pytest.mark.parametrize(
    ("peer", "known"),
    [
        ("torch", "silent, 0.50"),
        ("ema_pytorch", "silent, 0.50"),
        ("lightning", "silent, 0.50"),
        ("diffusers", "silent, 0.10"),
        ("torch_ema", "silent, 0.10"),
    ],
)
def test_a_resume_under_another_rule_gives_a_warning(peer: str, known: Any) -> None:
    """0.50: the rule is not in the saved state. 0.10: it is, and replaces what was configured."""
    compare(resumed_with_another_decay, "said, 0.50", peer, known)


def same_step_twice(make: type[Loop]) -> float:
    """0, then 1 absorbed twice for one optimizer step."""
    model = scalar(0.0)
    loop = make(model)
    loop.absorb()
    fill(model, 1.0)
    loop.absorb()
    loop.again()
    return weight_of(loop)


@pytest.mark.parametrize(
    ("peer", "known"),
    [("torch", 0.75), ("ema_pytorch", 0.75), ("diffusers", 0.75), ("torch_ema", 0.75), ("lightning", 0.5)],
)
def test_the_same_iteration_twice_is_refused(peer: str, known: Any) -> None:
    """As happens when the call sits inside the gradient-accumulation loop. Lightning counts, and ignores the second."""
    compare(same_step_twice, "ValueError", peer, known)


def every_tenth(make: type[Loop]) -> float:
    """What is left of the first weights after 100 steps at decay 0.9 with one update every 10 steps."""
    model = scalar(1.0)
    loop = make(model, 0.9, every=10)
    loop.absorb()
    fill(model, 0.0)
    for _ in range(100):
        loop.absorb()
    return weight_of(loop)


@pytest.mark.parametrize(("peer", "known"), [("ema_pytorch", 0.9**10), ("lightning", 0.9**10)])
def test_update_every_compounds_the_decay(peer: str, known: Any) -> None:
    """0.9**100 whatever the interval; without compounding the option makes the average ten times longer."""
    compare(every_tenth, 0.9**100, peer, known)
