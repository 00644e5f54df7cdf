"""What only a GPU can show: an update never waits for it. The arithmetic is tested on the CPU elsewhere."""

from typing import Any

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


def big() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 700), nn.BatchNorm1d(700), nn.Linear(700, 300)).cuda()


@pytest.mark.parametrize("change", [{"device": "cpu"}, {"overlap": True}], ids=["offloaded", "overlapped"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_in_the_background_the_average_is_the_same(change: dict[str, Any], dtype: str | None) -> None:
    """The optimizer's steps follow at once: they must wait until the weights before them were read."""
    model = big()
    bank = EMABank(
        model,
        {"here": EMAConfig(decay=0.9, dtype=dtype), "there": EMAConfig(decay=0.9, dtype=dtype, **change)},
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for iteration in range(20):
        model(torch.randn(64, 300, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        bank.update(model, iteration=iteration, finite=torch.tensor(iteration != 7, device="cuda"))
    here, there = bank["here"].state_dict(), bank["there"].state_dict()
    assert there["0.weight"].device.type == ("cpu" if "device" in change else "cuda")
    for name, value in here.items():
        if not name.startswith("_ema."):
            # The host and the device may round one lerp differently.
            torch.testing.assert_close(
                there[name].cuda(), value, rtol=1e-5 if dtype != "bfloat16" else 2e-2, atol=1e-6
            )
    assert bank["there"].num_skipped == 1


@pytest.mark.parametrize("change", [{"device": "cpu"}, {"overlap": True}], ids=["offloaded", "overlapped"])
def test_an_update_in_the_background_never_waits_for_the_device(change: dict[str, Any]) -> None:
    model = big()
    average = EMABank(model, {"a": EMAConfig(decay=0.5, **change)})
    for iteration in range(3):  # the first use of a kernel loads it, which waits for the device
        average.update(model, iteration=iteration)
    average["a"].wait()
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    average.update(model, iteration=3)
    busy.record()
    assert not busy.query(), "the host is ahead of the device"
    average["a"].wait()
