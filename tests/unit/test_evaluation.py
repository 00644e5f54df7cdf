"""The live weights and every average on the same samples, compared sample by sample."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from ema import EMABank, EMAConfig
from tests.makers import constant_network, five_samples
from trainer.distributed.sharding import Network
from trainer.errors import ConfigError
from trainer.evaluation.evaluation import EvalBatch, Evaluation, evaluating, paired_gap, unfit_statistics
from trainer.evaluation.first_forward import try_forwards
from trainer.seeding import StepRandom


class Noisy:
    """A task whose loss is (weight - noise)^2: closed forms for the mean and the gap."""

    primary_metric = "loss"

    def metrics(self, model: nn.Module, batch: dict, random: StepRandom) -> dict:
        assert not torch.is_grad_enabled()
        assert not model.training
        return {"loss": (model(batch["x"]).squeeze(1) - random.normal()).square()}


class Further(Noisy):
    """A task with a further metric, made of the losses of each batch by a function, and none where that returns None.

    With `of_a_set` the same function makes it of the losses of the whole set.
    """

    biased = ()
    higher_is_better: tuple[str, ...] = ()

    def __init__(self, make: Callable[[torch.Tensor], Any], of_a_set: bool) -> None:
        self.make, self.of_a_set = make, of_a_set

    def losses(self, model: nn.Module, batch: dict, random: StepRandom) -> torch.Tensor:
        return self.metrics(model, batch, random)["loss"]

    def metrics(self, model: nn.Module, batch: dict, random: StepRandom) -> dict:
        values = super().metrics(model, batch, random)
        return values if self.of_a_set else self._with_further(values)

    def set_metrics(self, values: dict) -> dict:
        return self._with_further(values) if self.of_a_set else values

    def _with_further(self, values: dict) -> dict:
        made = self.make(values["loss"])
        return values if made is None else values | {"further": made}


def judged_by(task: Noisy) -> tuple[Network, Evaluation]:
    return constant_network(0.0), Evaluation(task, partial(five_samples, torch.ones_like), 5)


def test_gap_and_standard_error_are_those_of_paired_samples() -> None:
    live, average = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, 1.0, 2.5, 3.0])
    # differences 0.5, 1, 0.5, 1: mean 0.75, standard deviation 1/sqrt(12), over sqrt(4)
    gap, error = paired_gap(live, average)
    assert gap == pytest.approx(0.75)
    assert error == pytest.approx(1 / math.sqrt(12) / 2)
    assert math.isnan(paired_gap(live[:1], average[:1])[1])


def test_live_and_average_see_the_same_noise_and_padding_is_left_out(group: None) -> None:
    net = constant_network(0.0)
    bank = EMABank(net.module, {"0.5": EMAConfig(decay=0.5)})
    bank.update(net.module, iteration=1)
    nn.init.constant_(net.module.weight, 2.0)
    bank.update(net.module, iteration=2)  # the average is at 1
    record = Evaluation(Noisy(), partial(five_samples, torch.ones_like), 5)(net, bank)
    noise = StepRandom(0, -1, total=5, rows=torch.arange(5)).normal().double()
    live, average = (2 - noise).square(), (1 - noise).square()
    assert record["eval/live/loss"] == pytest.approx(float(live.mean()), rel=1e-6)
    assert record["eval/ema/0.5/loss"] == pytest.approx(float(average.mean()), rel=1e-6)
    gap, error = paired_gap(live, average)
    assert record["eval/gap/0.5/loss"] == pytest.approx(gap, rel=1e-5)
    assert record["eval/gap/0.5/loss_se"] == pytest.approx(error, rel=1e-5)
    assert net.module.weight.item() == 2.0
    assert net.module.training


@pytest.mark.parametrize("of_a_set", [False, True])
@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda loss: loss[:, None], r"\(3, 1\)"),
        (lambda loss: loss.mean(), r"\(\)"),
        (lambda loss: loss[::2], r"\(2,\)"),
        (lambda loss: float(loss.mean()), "float"),
    ],
)
def test_a_metric_that_is_not_one_value_per_sample_is_refused_before_the_first_step(
    make: Callable, got: str, of_a_set: bool
) -> None:
    with pytest.raises(ConfigError, match=rf"^task: metric further.*: expected .* \(3,\), got {got}$"):
        try_forwards(*judged_by(Further(make, of_a_set)))


def test_a_field_that_the_data_lacks_is_refused_with_those_that_it_has() -> None:
    net, evaluation = judged_by(Further(lambda loss: loss, of_a_set=False))
    evaluation.task.losses = lambda model, batch, random: batch["image"]
    with pytest.raises(ConfigError, match=r"KeyError: 'image' \(the batch has x float32 \[3, 1\]"):
        try_forwards(net, evaluation)


def test_a_metric_of_whole_numbers_is_a_mean_of_them(group: None) -> None:
    net, evaluation = judged_by(Further(lambda loss: loss > loss.median(), of_a_set=True))
    assert evaluation(net, {})["eval/live/further"] == 2 / 5


def test_a_metric_of_some_batches_only_is_refused_in_place_of_zeros_for_the_others(group: None) -> None:
    has = iter((True, False))
    net, evaluation = judged_by(Further(lambda loss: loss if next(has) else None, of_a_set=False))
    with pytest.raises(
        ConfigError, match=r"^task: expected the metrics loss, further of every batch, got loss$"
    ):
        evaluation(net, {})


def test_metrics_of_a_set_are_not_left_out_for_the_lack_of_an_attribute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = Further(lambda loss: loss, of_a_set=True)
    monkeypatch.delattr(Further, "biased")
    with pytest.raises(ConfigError, match=r"^task\.biased: expected names of metrics, or \[\], because"):
        try_forwards(*judged_by(task))


@pytest.mark.parametrize("attribute", ["higher_is_better", "biased"])
@pytest.mark.parametrize("declared", [("loss"), True, None, {"loss": False}, [1]])
def test_what_is_no_list_of_names_of_metrics_is_refused(attribute: str, declared: Any) -> None:
    task = Further(lambda loss: None, of_a_set=False)
    setattr(task, attribute, declared)
    with pytest.raises(ConfigError) as refusal:
        try_forwards(*judged_by(task))
    assert str(refusal.value) == f"task.{attribute}: expected a list of names of metrics, got {declared!r}"


@pytest.mark.parametrize("attribute", ["higher_is_better", "biased"])
def test_a_declaration_of_a_metric_that_nothing_computes_is_a_warning(attribute: str) -> None:
    task = Further(lambda loss: loss, of_a_set=False)
    setattr(task, attribute, ("further", "acuracy"))
    _, warnings, _ = try_forwards(*judged_by(task))
    assert warnings == [f"task.{attribute}: acuracy: no such metric; expected names of loss, further"]
    setattr(task, attribute, {"further"})
    assert try_forwards(*judged_by(task))[1] == []


@pytest.mark.parametrize("method", ["metrics", "set_metrics"])
def test_a_task_without_metrics_is_refused(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    task = Further(lambda loss: None, of_a_set=True)
    task.losses = lambda model, batch, random: model(batch["x"]).squeeze(1)
    monkeypatch.setattr(task, method, lambda *_: {})
    with pytest.raises(ConfigError, match=rf"^task: expected metrics from {method}\(\), got none$"):
        try_forwards(*judged_by(task))


def test_an_average_that_has_not_started_is_not_judged(group: None) -> None:
    net = constant_network(1.0)
    bank = EMABank(net.module, {"late": EMAConfig(start_iter=10)})
    bank.update(net.module, iteration=1)
    assert list(Evaluation(Noisy(), partial(five_samples, torch.ones_like), 5)(net, bank)) == [
        "eval/live/loss"
    ]


def test_the_mode_of_every_module_comes_back_also_after_an_error() -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1).eval())
    net = Network(module, module, None, torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), evaluating(net):
        assert not module[0].training
        raise ZeroDivisionError
    assert [m.training for m in module.modules()] == [True, True, False]


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class OtherForward:
    """A task that measures with another forward than the one it is trained with: ten above its input."""

    primary_metric = "loss"

    def losses(self, model: nn.Module, batch: dict, random: StepRandom) -> torch.Tensor:
        return model(batch["x"]).squeeze(1)

    def metrics(self, model: nn.Module, batch: dict, random: StepRandom) -> dict:
        return {"loss": model(batch["x"] + 10).squeeze(1)}


def three_samples() -> Iterator[EvalBatch]:
    noise = StepRandom(0, -1, total=3, rows=torch.arange(3))
    samples = torch.tensor([[1.0], [2.0], [6.0]])  # mean 3, unbiased variance 7
    yield EvalBatch({"x": samples}, torch.ones(3, dtype=torch.bool), torch.arange(3), noise)


def test_statistics_of_an_average_are_of_the_forward_that_is_trained(group: None) -> None:
    module = nn.BatchNorm1d(1, affine=False)
    net = Network(module, module, None, torch.device("cpu"))
    values = Evaluation(OtherForward(), three_samples, 3, three_samples).evaluate(net, reestimate=True)
    assert (module.running_mean.item(), module.running_var.item()) == pytest.approx((3, 7))
    assert values["loss"].tolist() == pytest.approx([(x + 10 - 3) / (7 + 1e-5) ** 0.5 for x in (1, 2, 6)])


def test_statistics_to_store_have_the_names_of_a_submodule_called_module(group: None) -> None:
    module = nn.Sequential(OrderedDict(module=nn.BatchNorm1d(1)))
    net = Network(module, torch.compile(module), None, torch.device("cpu"))
    bank = EMABank(module, {"0.5": EMAConfig(decay=0.5), "late": EMAConfig(start_iter=9)})
    bank.update(module, iteration=1)
    found = Evaluation(OtherForward(), three_samples, 3, three_samples).statistics(net, bank)
    assert found == {"0.5": {f"module.{name}": found["0.5"][f"module.{name}"] for name in STATISTICS}}
    assert [found["0.5"][f"module.{name}"].item() for name in STATISTICS] == pytest.approx([3, 7, 1])
    assert module.module.running_mean.item() == 0


def test_averages_with_the_running_statistics_of_the_live_weights_are_named() -> None:
    """torch's BatchNorm can be estimated again; other running statistics can be averaged."""

    class OwnNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(1))

    plain, averaged = {"0.9": EMAConfig()}, {"0.9": EMAConfig(average_buffers=["*running_*"])}
    both = nn.Sequential(nn.BatchNorm1d(1), OwnNorm())
    (warning,) = unfit_statistics(both, 0, plain)
    assert warning.startswith(
        "ema.batchnorm_batches: 0 evaluates each average with the running statistics of the live"
    )
    assert (
        "(BatchNorm1d, OwnNorm)" in warning
        and "train with ema.batchnorm_batches=10 or ema.average_buffers" in warning
    )
    (warning,) = unfit_statistics(both, 2, plain)
    assert "(OwnNorm)" in warning and "train with ema.average_buffers" in warning
    assert not unfit_statistics(both, 0, averaged) and not unfit_statistics(both, 0, {})
    for module in (nn.LayerNorm(1), nn.BatchNorm1d(1, track_running_stats=False)):
        assert not unfit_statistics(module, 0, plain)


class Taught(OtherForward):
    """A task whose loss calls a teacher in both modes before the student."""

    def losses(self, model: nn.Module, batch: dict, random: StepRandom, averages: Any) -> torch.Tensor:  # type: ignore[override]
        for train in (False, True):
            assert not averages["0.5"](batch["x"] * 100, train=train).requires_grad
        return model(batch["x"]).squeeze(1)


def test_statistics_are_those_of_the_student_where_a_task_takes_averages(group: None) -> None:
    module = nn.BatchNorm1d(1, affine=False)
    net = Network(module, module, None, torch.device("cpu"))
    evaluation = Evaluation(Taught(), three_samples, 3, three_samples, averages=["0.5"])
    evaluation.evaluate(net, reestimate=True)
    assert (module.running_mean.item(), module.running_var.item()) == pytest.approx((3, 7))
