"""What only a GPU can show: an update never waits for it. The arithmetic is tested on the CPU elsewhere."""

import pytest
import torch
from torch import nn

from ema import EMABank, EMAConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_an_update_with_a_flag_on_the_device_never_waits_for_it() -> None:
    model = nn.Sequential(nn.Linear(300, 700), nn.BatchNorm1d(700)).cuda()
    bank = EMABank(model, {"wide": EMAConfig(decay=0.5), "low": EMAConfig(decay=0.5, dtype="bfloat16")})
    flag = torch.ones((), dtype=torch.bool, device="cuda")
    bank.update(model, iteration=0, finite=flag)
    before = bank.state_dict(snapshot=True)
    with torch.no_grad():
        model[0].weight.fill_(2)
        model[1].running_mean.fill_(float("nan"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        bank.update(model, iteration=1, finite=~flag)
        bank.update(model, iteration=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = torch.lerp(before["wide/0.weight"], model[0].weight.detach(), 0.5)
    torch.testing.assert_close(bank.state_dict()["wide/0.weight"], expected)
    assert (bank["wide"].num_updates, bank["wide"].num_skipped) == (2, 1)


def test_a_model_that_moves_to_the_gpu_takes_its_average_along() -> None:
    model = nn.Linear(4, 4)
    bank = EMABank(model, {"a": EMAConfig(decay=0.5)})
    bank.update(model, iteration=0)
    model.cuda()
    bank.update(model, iteration=1)
    assert bank["a"].state_dict()["weight"].device.type == "cuda"
