"""BatchNorm statistics for averaged weights; the expected ones are those of torch.optim.swa_utils.update_bn."""

import copy

import pytest
import torch
from torch import nn

from ema import reestimate_batchnorm


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.5), nn.Linear(4, 2))


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [5 + torch.randn(7, 3, generator=generator) for _ in range(4)]


def test_statistics_are_those_of_torchs_update_bn() -> None:
    ours, theirs = network(), network()
    ours[1].running_mean.fill_(99)
    reestimate_batchnorm(ours, batches())
    torch.optim.swa_utils.update_bn(batches(), theirs)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(ours[1], name), getattr(theirs[1], name)), name


def test_modes_and_momentum_come_back_module_by_module() -> None:
    model = network().train()
    model[2].eval()
    seen = []
    model[2].register_forward_hook(lambda module, args, output: seen.append(module.training))
    reestimate_batchnorm(model, [(batch, None) for batch in batches()])
    assert seen == [False] * 4, "no dropout while statistics are taken"
    assert [module.training for module in model] == [True, True, False, True]
    assert model[1].momentum == 0.3


def test_a_forward_of_ones_own_reads_any_batch() -> None:
    ours, theirs = network(), network()
    reestimate_batchnorm(ours, [{"x": b} for b in batches()], forward=lambda model, batch: model(batch["x"]))
    reestimate_batchnorm(theirs, batches())
    assert torch.equal(ours[1].running_mean, theirs[1].running_mean)


def test_a_failure_leaves_everything_as_it_was() -> None:
    model = network()
    model(batches()[0])
    before = copy.deepcopy(model.state_dict())
    for broken, error in (([], ValueError), ([batches()[0], torch.zeros(2, 9)], RuntimeError)):
        with pytest.raises(error):
            reestimate_batchnorm(model, broken)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model[1].momentum == 0.3 and model[1].training


def test_a_model_without_batchnorm_reads_no_batch() -> None:
    def never() -> object:
        raise AssertionError("read")
        yield

    reestimate_batchnorm(nn.Linear(2, 2), never())  # type: ignore[arg-type]


class WithTrainingHead(nn.Module):
    """A network with a norm that runs in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.auxiliary = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.norm(inputs) + (self.auxiliary(inputs) if self.training else 0)


def test_a_norm_that_no_forward_reaches_keeps_its_statistics() -> None:
    model = WithTrainingHead()
    model(torch.randn(8, 3) + 4)
    before = copy.deepcopy(model.auxiliary.state_dict())
    reestimate_batchnorm(model, [torch.zeros(4, 3)])
    assert model.norm.running_mean.eq(0).all()
    assert all(torch.equal(value, before[name]) for name, value in model.auxiliary.state_dict().items())
