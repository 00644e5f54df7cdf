"""Averages that are updated beside the training: the same numbers, nothing waits, nothing is lost.

A thread that waits for an event is used as a slow thread. A device's streams are replaced by a record of what was
asked of them: this is a mock, for machines without an accelerator; tests/unit/test_ema_cuda.py has the real ones.
"""

import copy
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ema.background
import ema.track
import ema.update
from ema import EMABank, EMAConfig, ExponentialMovingAverage, divergence
from ema.background import Background
from tests.makers import assert_same, network, shake

CONFIGS = {
    "wide": EMAConfig(decay=0.9),
    "low": EMAConfig(decay=0.9, dtype="bfloat16", average_buffers=["*.running_*"]),
    "late": EMAConfig(type="power", gamma=6.94, start_iter=3, update_every=2),
    "exact": EMAConfig(type="warmup", dtype="float64"),
}


def on_host(config: EMAConfig) -> EMAConfig:
    return EMAConfig(**{**vars(config), "device": "cpu"})


@contextmanager
def held_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The thread does not begin its job before the event is set; what it was given before must be done."""
    go = threading.Event()
    take = ema.update._blend_cohort

    def late(*args: Any, **kwargs: Any) -> None:
        assert go.wait(60)
        take(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ema.update, "_blend_cohort", late)
        try:
            yield go
        finally:
            go.set()


@pytest.mark.parametrize("flag", ["bool", "tensor"])
@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16])
def test_on_the_host_every_average_is_the_same_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, live: torch.dtype, flag: str
) -> None:
    if flag == "tensor":
        # As with a flag on a device.
        monkeypatch.setattr(ema.update, "step_flag", lambda finite: torch.tensor(finite))
    model = network(seed=3).to(live)
    here = EMABank(model, CONFIGS)
    there = EMABank(model, {name: on_host(config) for name, config in CONFIGS.items()})
    for iteration in range(12):
        shake(model)
        model[1].running_mean.add_(1)
        finite = iteration not in (5, 8)
        with monkeypatch.context() as patch:
            patch.setattr(ema.update, "step_flag", lambda finite: finite)
            here.update(model, iteration=iteration, finite=finite)
        there.update(model, iteration=iteration, finite=finite)
    for name in CONFIGS:
        assert_same(
            there[name].state_dict(),
            {**here[name].state_dict(), "_ema.rule": there[name].state_dict()["_ema.rule"]},
        )
        assert there[name].num_skipped == here[name].num_skipped


def test_an_update_returns_before_the_average_is_made_and_keeps_the_weights_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The live weights change while the thread has not begun: it averages those of the call."""
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5, device="cpu"))
    average.update(model, iteration=0)
    first = average.state_dict(snapshot=True)["0.weight"]
    with held_up(monkeypatch) as go:
        shake(model)
        second = model[0].weight.detach().clone()
        average.update(model, iteration=1)
        assert torch.equal(average.track.shadows["0.weight"], first), "nothing was done yet"
        shake(model)
        go.set()
        torch.testing.assert_close(average.state_dict()["0.weight"], (first + second) / 2)


def read_state(average: ExponentialMovingAverage, model: nn.Module) -> Tensor:
    return average.state_dict()["0.weight"]


def read_copy(average: ExponentialMovingAverage, model: nn.Module) -> Tensor:
    target = network(seed=3)
    average.copy_to(target)
    return target[0].weight.detach()


def read_swap(average: ExponentialMovingAverage, model: nn.Module) -> Tensor:
    with average.swapped_into(model):
        return model.state_dict()["0.weight"].clone()


def read_after_wait(average: ExponentialMovingAverage, model: nn.Module) -> Tensor:
    average.wait()
    return average.track.shadows["0.weight"]


@pytest.mark.parametrize("read", [read_state, read_copy, read_swap, read_after_wait])
def test_every_reader_waits(monkeypatch: pytest.MonkeyPatch, read: Any) -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5, device="cpu"))
    average.update(model, iteration=0)
    first = model[0].weight.detach().clone()
    average.wait()
    shake(model)
    with held_up(monkeypatch) as go:
        average.update(model, iteration=1)
        threading.Timer(0.05, go.set).start()
        found = read(average, model)
    torch.testing.assert_close(found, (first + model[0].weight.detach()) / 2)


def test_the_divergence_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(seed=3)
    bank = EMABank(model, {"a": EMAConfig(decay=0.0, device="cpu")})
    bank.update(model, iteration=0)
    bank["a"].wait()
    shake(model)
    with held_up(monkeypatch) as go:
        bank.update(model, iteration=1)
        threading.Timer(0.05, go.set).start()
        assert divergence(bank, model)["a"].rel_l2 == 0


def test_what_fails_in_the_thread_is_raised_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(device="cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(ema.update, "_blend_cohort", lambda *_, **__: 1 / 0)
        average.update(model, iteration=0)
        with pytest.raises(ZeroDivisionError):
            average.wait()
    with pytest.raises(RuntimeError, match="failed midway"):
        average.update(model, iteration=2)


def test_a_job_that_failed_stops_the_next_update_before_anything_is_absorbed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise the averages that are not kept on the host would absorb the repeated iteration twice."""
    model = network(seed=3)
    bank = EMABank(model, {"here": EMAConfig(decay=0.5), "there": EMAConfig(decay=0.5, device="cpu")})
    bank.update(model, iteration=0)
    bank["there"].wait()
    take = ema.update._blend_cohort

    def failing(cohort: Any, *, buffers: bool) -> None:
        if cohort.layout.stage is not None:
            raise ZeroDivisionError
        take(cohort, buffers=buffers)

    with monkeypatch.context() as patch:
        patch.setattr(ema.update, "_blend_cohort", failing)
        bank.update(model, iteration=1)
        before = {name: value.clone() for name, value in bank["here"].track.shadows.items()}
        shake(model)
        with pytest.raises(ZeroDivisionError):
            bank.update(model, iteration=2)
    assert_same(bank["here"].track.shadows, before)
    bank["here"].state_dict()
    with pytest.raises(RuntimeError, match="failed midway"):
        bank.update(model, iteration=2)


def test_an_average_that_starts_is_not_held_back_by_the_flag_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The start copies the live weights whatever became of the step; it shares its layout with a running average."""
    monkeypatch.setattr(ema.update, "step_flag", lambda finite: torch.tensor(finite))
    model = network(seed=3)
    configs = {"late": EMAConfig(device="cpu", start_iter=2), "early": EMAConfig(device="cpu")}
    for order in (configs, dict(reversed(configs.items()))):
        bank = EMABank(model, order)
        for iteration in range(3):
            shake(model)
            bank.update(model, iteration=iteration, finite=iteration != 2)
        assert torch.equal(bank["late"].state_dict()["0.weight"], model[0].weight)
        assert not torch.equal(bank["early"].state_dict()["0.weight"], model[0].weight)


def test_averages_of_several_dtypes_on_the_host_do_not_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network(seed=3)
    bank = EMABank(model, {d: EMAConfig(device="cpu", dtype=d) for d in ("float32", "float64", "bfloat16")})
    bank.update(model, iteration=0)
    bank["float32"].wait()
    with held_up(monkeypatch) as go:
        bank.update(model, iteration=1)  # would wait for ever for the first of three jobs
        assert not go.is_set()


def test_an_interrupted_wait_is_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a wait: what is saved afterwards must not change under the writer's hands."""
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.0, device="cpu"))
    average.update(model, iteration=0)
    average.wait()
    shake(model)
    with held_up(monkeypatch) as go:
        average.update(model, iteration=1)
        with monkeypatch.context() as patch:
            patch.setattr(Future, "result", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                average.wait()
        go.set()
        assert torch.equal(average.state_dict()["0.weight"], model[0].weight)


def test_a_copy_of_an_average_on_the_host_is_one_of_its_own() -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5, device="cpu"))
    average.update(model, iteration=0)
    copied, twin = copy.deepcopy((average, model))
    shake(twin)
    copied.update(twin, iteration=1)
    assert not torch.equal(copied.state_dict()["0.weight"], average.state_dict()["0.weight"])
    assert average.num_updates == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_a_thread_of_its_own() -> None:
    """The parent's thread does not exist in the child, which would wait for it for ever."""
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(device="cpu"))
    average.update(model, iteration=0)
    average.wait()
    child = os.fork()
    if not child:
        signal.alarm(60)
        average.update(model, iteration=1)
        average.wait()
        os._exit(0 if average.num_updates == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_another_default_device_changes_nothing() -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(device="cpu"))
    with torch.device("meta"):
        for iteration in range(2):
            average.update(model, iteration=iteration)
        average.load_state_dict(average.state_dict())
    assert average.num_updates == 2


def test_a_loaded_average_is_not_overwritten_by_the_update_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5, device="cpu"))
    average.update(model, iteration=0)
    saved = average.state_dict(snapshot=True)
    shake(model)
    with held_up(monkeypatch) as go:
        average.update(model, iteration=1)
        threading.Timer(0.05, go.set).start()
        average.load_state_dict(saved)
    average.wait()
    assert_same(average.state_dict(), saved)


def test_nothing_is_allocated_by_an_update_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(device="cpu"))
    for iteration in range(2):
        average.update(model, iteration=iteration)
    average.wait()
    with torch.profiler.profile(profile_memory=True) as profiler:
        average.update(model, iteration=2)
        average.wait()
    assert sum(max(0, event.self_cpu_memory_usage) for event in profiler.key_averages()) == 0


class FakeDevice:
    """Stands for `torch.cuda`: notes what streams and events are asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.Stream = lambda device: self.stream_named("side", device)
        self.Event = lambda: SimpleNamespace(
            record=lambda stream: self.calls.append("record"),
            synchronize=lambda: self.calls.append("synchronize"),
        )

    def stream_named(self, name: str, device: Any) -> Any:
        return SimpleNamespace(
            device=device,
            wait_stream=lambda other: self.calls.append(f"{name} waits for stream"),
            wait_event=lambda event: self.calls.append(f"{name} waits for event"),
        )

    def current_stream(self, device: Any) -> Any:
        return self.stream_named("main", device)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.calls.append("enter side")
        yield
        self.calls.append("leave side")


@pytest.fixture
def late_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock of a side stream that does its work as late as possible: when the code waits for it."""
    pending: dict[int, Any] = {}
    make_layout = ema.track.make_layout

    def overlapped(*args: Any, staged: bool, overlap: bool) -> Any:
        layout = make_layout(*args, staged=staged, overlap=False)
        layout.overlap = torch.device("cpu") if overlap else None
        return layout

    def overlap(self: Background, device: torch.device, flag: Any, job: Any) -> None:
        self.release_live()
        pending[id(self)] = lambda: job(flag)

    def release_live(self: Background) -> None:
        job = pending.pop(id(self), None)
        if job is not None:
            with torch.no_grad():
                job()

    monkeypatch.setattr(ema.track, "make_layout", overlapped)
    monkeypatch.setattr(Background, "overlap", overlap)
    monkeypatch.setattr(Background, "release_live", release_live)


@pytest.mark.usefixtures("late_stream")
def test_buffers_are_those_of_the_update_although_the_next_forward_writes_them() -> None:
    model = network(seed=3)
    here = ExponentialMovingAverage(model, EMAConfig(decay=0.9, average_buffers=["*.running_mean"]))
    there = ExponentialMovingAverage(
        model, EMAConfig(decay=0.9, average_buffers=["*.running_mean"], overlap=True)
    )
    for iteration in range(3):
        model(torch.randn(8, 3))
        there.wait()  # as the optimizer's step does
        shake(model)
        here.update(model, iteration=iteration)
        there.update(model, iteration=iteration)
    model(torch.randn(8, 3))
    found = there.state_dict()
    assert int(found["1.num_batches_tracked"]) == 3
    for name in ("1.running_mean", "1.running_var", "0.weight"):
        assert torch.equal(found[name], here.state_dict()[name])


@pytest.mark.usefixtures("late_stream")
def test_another_average_of_the_same_model_is_not_swapped_in_under_a_reader() -> None:
    model = network(seed=3)
    reading = ExponentialMovingAverage(model, EMAConfig(decay=0.0, overlap=True))
    other = ExponentialMovingAverage(model, EMAConfig(decay=0.9))
    for iteration in range(2):
        shake(model)
        reading.wait()
        other.update(model, iteration=iteration)
        reading.update(model, iteration=iteration)
    live = model[0].weight.detach().clone()
    with other.swapped_into(model):
        assert torch.equal(reading.track.shadows["0.weight"], live), "read before it was written"
    reading.wait()
    shake(model)
    live = model[0].weight.detach().clone()
    reading.update(model, iteration=2)
    other.copy_to(model)
    assert torch.equal(reading.track.shadows["0.weight"], live)


def test_an_overlapped_update_runs_beside_and_the_optimizer_step_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = FakeDevice()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    background = Background()
    background.overlap(torch.device("cuda"), None, lambda flag: device.calls.append("average"))
    assert device.calls == ["side waits for stream", "enter side", "average", "record", "leave side"]
    device.calls.clear()
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert device.calls == ["main waits for event"]
    del background
    assert device.calls == ["main waits for event"] * 2, "memory in use beside is not given back before"
    optimizer.step()
    assert device.calls == ["main waits for event"] * 2, "the hook goes with the averages"
