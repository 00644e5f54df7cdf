"""The loop: what a step is, what is due when, and what a non-finite step does."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from ema import EMABank, EMAConfig
from tests.makers import assert_same
from tests.small_loop import Pull, Recorder, make_run, train
from trainer.config.schema import OptimizerConfig
from trainer.distributed.buffers import TrainingBuffers
from trainer.distributed.sharding import Network
from trainer.errors import ConfigError, NonFiniteStep
from trainer.loggers.progress import NullProgress
from trainer.loop.fit import Callbacks, Run, fit, is_due
from trainer.optimizers import LossScale, make_optimizer
from trainer.seeding import StepRandom

pytestmark = pytest.mark.usefixtures("group")


def test_accumulated_micro_batches_make_the_step_of_the_whole_batch() -> None:
    # weight 0, lr 1/4, loss mean (w - x)^2: one step goes to mean(x) / 2, whatever the accumulation.
    for accumulate in (1, 2, 4):
        run = make_run([[1.0, 2.0, 3.0, 6.0]], accumulate=accumulate)
        records = train(run)
        assert run.network.module.weight.item() == pytest.approx(1.5)
        assert records[1]["train/loss"] == pytest.approx(12.5)
        assert run.bank["0.5"].num_updates == 2  # the first weights, and the step


def test_a_non_finite_step_is_skipped_counted_and_not_averaged() -> None:
    run = make_run([[2.0], [float("nan")], [2.0]])
    records = train(run)
    # 0 -> 1 -> (skipped) 1 -> 1.5; the average starts at 0, takes half of 1 and half of 1.5.
    assert run.network.module.weight.item() == pytest.approx(1.5)
    assert [records[step]["train/skipped_steps"] for step in (1, 2, 3)] == [0, 1, 1]
    assert run.bank["0.5"].num_skipped == 1
    with run.bank["0.5"].swapped_into(run.network.module):
        assert run.network.module.weight.item() == pytest.approx(1.0)


def test_the_stop_policy_ends_the_run_at_the_next_logged_step() -> None:
    run = make_run([[2.0], [float("inf")], [2.0], [2.0]], non_finite="stop", log_every=3)
    with pytest.raises(NonFiniteStep):
        train(run)
    assert run.step == 3


def test_a_stop_saves_and_leaves_at_this_step() -> None:
    run = make_run([[2.0]] * 5, save_every=0)
    saved: list[int] = []
    train(run, save=lambda run, last: saved.append(run.step), stop_requested=lambda: run.step == 3)
    assert (run.step, saved, run.finished) == (3, [3], False)


def test_every_step_is_due_by_its_own_number_and_0_is_never() -> None:
    assert [step for step in range(1, 8) if is_due(step, 3)] == [3, 6]
    assert not any(is_due(step, 0) for step in range(5))


def test_saves_happen_each_save_every_steps_and_at_the_end() -> None:
    run = make_run([[2.0]] * 5, save_every=2)
    saved: list[int] = []
    train(run, save=lambda run, last: saved.append(run.step))
    assert saved == [2, 4, 5]


def test_saves_by_the_clock_happen_where_all_ranks_agreed_and_change_no_number() -> None:
    run, without = (make_run([[2.0], [3.0], [5.0], [1.0]], save_every="10min") for _ in range(2))
    saved: list[int] = []
    callbacks = Callbacks(
        evaluate=lambda network, bank: {},
        logger=Recorder(),
        display=NullProgress(),
        save=lambda run, last: saved.append(run.step),
        stop_requested=lambda: False,
        save_requested=lambda: run.step in (1, 3),
    )
    fit(run, callbacks)
    train(without)
    assert saved == [1, 3, 4]
    assert_same(run.network.module.state_dict(), without.network.module.state_dict())


def test_the_length_of_a_logged_step_is_logged_and_0_if_it_was_skipped() -> None:
    # The weight goes 0 -> 1 -> (skipped) 1 -> 1.5.
    for with_average in (True, False):
        run = make_run([[2.0], [float("nan")], [2.0]])
        if not with_average:
            run.bank = EMABank(run.network.module, {})
        records = train(run)
        found = [records[step]["train/update_rel_l2"] for step in (1, 2, 3)]
        assert found == pytest.approx([1, 0, 1 / 3])
        assert not any("live/" in key for key in records[3])


def test_the_weights_are_copied_at_logged_steps_only_and_let_go() -> None:
    run = make_run([[2.0]] * 5, log_every=3)
    copied: list[int] = []
    before = run.measure.before

    def count(run: Run) -> None:
        copied.append(run.step + 1)
        before(run)

    run.measure.before = count  # type: ignore[method-assign]
    assert list(train(run)) == [3, 5] == copied
    assert run.measure._before is None  # type: ignore[attr-defined]


def test_the_slope_over_decays_is_logged_once_both_have_settled() -> None:
    # x = w + 2 moves the weight by 1 a step: M lags by b / (1 - b) = 3 and 7, at horizons of 4 and 8.
    run = make_run([[step + 2.0] for step in range(60)])
    run.bank = EMABank(run.network.module, {"0.75": EMAConfig(decay=0.75), "0.875": EMAConfig(decay=0.875)})
    records = train(run)
    # The average begins at step 0, and three horizons of 8 later two updates of that decay lie apart.
    assert [step for step, record in records.items() if "ema/slope" in record] == list(range(25, 61))
    assert records[60]["ema/slope"] == pytest.approx(2 * math.log(7 / 3) / math.log(2), rel=0.01)
    assert records[60]["ema/0.75/rel_l2"] == pytest.approx(3 / 60, rel=1e-3)


class Stateful(nn.Module):
    """A model with each kind of state that a forward changes: BatchNorm, a running mean, one that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.norm = nn.BatchNorm1d(1)
        self.register_buffer("centre", torch.zeros(1))
        self.register_buffer("peak", torch.zeros(1), persistent=False)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("first", None)
        self.register_buffer("constant", torch.ones(1).expand(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.centre.data.lerp_(x.mean(0), 0.5)
            self.peak = torch.maximum(self.peak, x.amax(0))
            self.count += 1
            self.first = x[:1].clone() if self.first is None else self.first
        return self.norm(self.layer(x)) + self.centre


class Feed(Pull):
    """The data go into the model, not only into the loss."""

    def losses(self, model: nn.Module, batch: dict, random: StepRandom) -> torch.Tensor:
        return model(batch["x"][:, None]).squeeze(1).square()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_leaves_every_buffer_as_it_was(accumulate: int) -> None:
    def train_on(xs: list[list[float]]) -> dict[str, torch.Tensor]:
        run = make_run(xs, accumulate=accumulate)
        torch.manual_seed(0)
        module = Stateful()
        run.network, run.task = Network(module, module, None, torch.device("cpu")), Feed()  # type: ignore[assignment]
        run.optimizer = make_optimizer(module, OptimizerConfig(name="SGD", lr=0.25))
        run.bank = EMABank(module, {"0.5": EMAConfig(decay=0.5)})
        train(run)
        average = run.bank["0.5"].state_dict()
        copied = {f"ema/{name}": average[name] for name, _ in module.named_buffers() if name in average}
        return {**module.state_dict(), "peak": module.peak, **copied}

    nan = float("nan")
    good = [[1.0, 2.0, 3.0, 7.0], [5.0, 4.0, 2.0, 1.0]]
    for broken in ([1.0, 2.0, 3.0, nan], [nan, 0.0, 1.0, 2.0]):
        assert_same(train_on([broken, good[0], broken, good[1]]), train_on(good))


def test_a_flag_on_the_device_restores_the_buffers_without_being_read() -> None:
    for finite in (True, False):
        module = Stateful()
        module.first = torch.zeros(1, 1)
        buffers = TrainingBuffers(module)
        buffers.save()
        before = {name: value.clone() for name, value in module.named_buffers()}
        module(torch.ones(4, 1))
        after = {name: value.clone() for name, value in module.named_buffers()}
        buffers.restore_unless(Unread(torch.tensor(finite)))
        assert_same(dict(module.named_buffers()), after if finite else before)


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_step_may_have_sparse_buffers_and_replace_them(sparse: Any, on_device: bool) -> None:
    module = Stateful()
    module.register_buffer("edges", sparse(torch.eye(2)), persistent=False)
    edges = module.edges
    buffers = TrainingBuffers(module)
    for finite in (True, False):
        flag = torch.tensor(finite)
        buffers.save()
        buffers.restore_unless(Unread(flag) if on_device else flag)
        assert module.edges is edges
    buffers.save()
    module.edges = sparse(torch.ones(2, 2))
    buffers.restore_unless(torch.tensor(False))
    assert module.edges is edges


class Unread(torch.Tensor):
    """A flag that calls itself a GPU's and fails when the host reads it."""

    @staticmethod
    def __new__(cls, flag: torch.Tensor) -> "Unread":
        return torch.Tensor._make_subclass(cls, flag)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")

    def to(self, *args: object) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)

    def __bool__(self) -> bool:
        raise AssertionError("the host waited for the device")


def test_the_stop_policy_counts_the_skips_of_this_session_only() -> None:
    run = make_run([[2.0]] * 3, non_finite="stop")
    run.skipped, run.skipped_before = run.skipped + 2, 2
    assert train(run)[3]["train/skipped_steps"] == 2
    run = make_run([[2.0], [float("nan")], [2.0]], non_finite="stop")
    run.skipped, run.skipped_before = run.skipped + 2, 2
    with pytest.raises(NonFiniteStep, match="step 2"):
        train(run)


def test_a_finished_session_that_took_no_step_has_failed() -> None:
    nan = float("nan")
    for xs, code in (([[nan]] * 3, 1), ([[nan], [2.0], [nan]], 0), ([], 0)):
        run = make_run(xs)
        train(run)
        assert run.exit_code == code
    # The weights became non-finite after a step that was taken: the last step is skipped and so is every later one.
    for last, loss, code in ((nan, nan, 1), (nan, 0.5, 0), (2.0, nan, 0)):
        run = make_run([[2.0], [last]])
        value = {"eval/live/loss": loss}
        fit(run, Callbacks(lambda *_, value=value: value, Recorder(), NullProgress(), lambda *_: None, bool))
        assert run.exit_code == code
    stopped = make_run([[nan]] * 5)
    train(stopped, stop_requested=lambda: stopped.step == 3)
    assert stopped.exit_code == 75


class FollowsTeacher(Pull):
    """Loss (weight - (1 + teacher))^2 per sample, with the teacher's answer from after the student's forward."""

    name = "0.5"

    def losses(self, model: nn.Module, batch: dict, random: StepRandom, averages: Any) -> torch.Tensor:  # type: ignore[override]
        x = torch.ones(len(batch["x"]), 1)
        answer = model(x)
        assert list(averages) == ["0.5"]
        return (answer - 1 - averages[self.name](x)).squeeze(1).square()


def test_a_task_that_takes_averages_is_taught_by_them_before_each_update() -> None:
    """The weight moves half of the way to 1 + average; the average starts as the first weight."""
    run = make_run([[0.0]] * 4)
    run.task = FollowsTeacher()  # type: ignore[assignment]
    train(run)
    weight, average = 0.0, 0.0
    for _ in range(4):
        weight += (1 + average - weight) / 2
        average = (average + weight) / 2
    assert run.network.module.weight.item() == pytest.approx(weight, rel=1e-6)
    assert run.bank["0.5"].state_dict()["weight"].item() == pytest.approx(average, rel=1e-6)


def test_an_average_that_the_run_has_not_is_refused_by_name() -> None:
    run = make_run([[0.0]])
    run.task = FollowsTeacher()  # type: ignore[assignment]
    run.task.name = "other"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"task: expected an average of the run, one of 0.5, got 'other'"):
        train(run)


class SmallPull(Pull):
    """Gradients near 1e-9, which float16 rounds to 0."""

    def losses(self, model: nn.Module, batch: dict, random: StepRandom) -> torch.Tensor:
        return super().losses(model, batch, random) * 1e-9


def float16_run(xs: list[list[float]], **settings: object) -> Run:
    run = make_run(xs, **settings)
    module = run.network.module
    run.network = Network(module, module, torch.float16, torch.device("cpu"))
    run.loss_scale = LossScale(torch.device("cpu"))
    return run


def test_small_gradients_survive_float16() -> None:
    run = float16_run([[3.0]])
    run.task = SmallPull()  # type: ignore[assignment]
    records = train(run)
    # weight 0, lr 1/4, loss 1e-9 (w - 3)^2: the gradient is -6e-9.
    assert records[1]["train/grad_norm"] == pytest.approx(6e-9, rel=1e-3)
    assert run.network.module.weight.item() == pytest.approx(1.5e-9, rel=1e-3)


@pytest.mark.parametrize(("max_norm", "gradient"), [(0.5, 0.5), (10.0, 6.0)])
def test_the_norm_that_clips_is_that_without_the_scale(max_norm: float, gradient: float) -> None:
    run = float16_run([[3.0]], max_grad_norm=max_norm)
    assert run.loss_scale is not None
    run.loss_scale.scale.fill_(2.0**8)
    train(run)
    assert run.network.module.weight.item() == pytest.approx(0.25 * gradient, rel=1e-3)


def test_an_overflow_skips_the_step_and_halves_the_scale_until_it_fits() -> None:
    run = float16_run([[3.0]] * 6)
    records = train(run)
    scales = [records[step]["train/loss_scale"] for step in range(1, 7)]
    # The gradient is 6 times the scale at weight 0, and float16 ends at 65504.
    assert scales == [2.0**15, 2.0**14, 2.0**13, 2.0**13, 2.0**13, 2.0**13]
    assert records[6]["train/skipped_steps"] == run.bank["0.5"].num_skipped == 3
    assert run.network.module.weight.item() == pytest.approx(3 * (1 - 0.5**3), rel=1e-3)
