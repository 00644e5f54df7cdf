"""Loss scaling. The peer is `torch.amp.GradScaler`."""

import pytest
import torch
from torch import nn

from trainer.optimizers import LossScale, loss_scale


def test_the_scale_changes_as_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    ours = LossScale(torch.device("cpu"))
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    weight = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for good in [False, False, True, True, True, True, False, True, True, True, True, True, True]:
        theirs.scale(weight * (1.0 if good else torch.inf)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(torch.tensor(good))
        assert ours.scale == theirs.get_scale()
    assert ours.state()["growth"] == 0


@pytest.mark.parametrize(
    ("name", "value"), [("scale", x) for x in (torch.nan, torch.inf, 0.0, -1.0, 1e-40)] + [("growth", -1)]
)
def test_a_stored_scale_that_cannot_scale_is_found(name: str, value: float) -> None:
    """Such a scale skips every step, or none, without a word."""
    scale = LossScale(torch.device("cpu"))
    assert scale.is_usable()
    scale.state()[name].fill_(value)
    assert not scale.is_usable()


def test_unscaled_gradients_are_those_of_the_loss_bit_for_bit() -> None:
    weights = [nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.ones(2))]
    (expected,) = torch.autograd.grad(weights[0].sin() * 1e-9, weights[:1])
    scale = LossScale(torch.device("cpu"))
    scale.scaled(weights[0].sin() * 1e-9).backward()
    assert weights[0].grad > 1e-5
    scale.unscale(weights)
    assert torch.equal(weights[0].grad, expected)
    assert weights[1].grad is None
