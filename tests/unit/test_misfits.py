"""Parts of a run that do not fit together in a step or an evaluation: one line names their keys."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ema import EMABank, EMAConfig
from tests.small_loop import Pull, Recorder, make_run, train
from trainer.config.schema import OptimizerConfig
from trainer.distributed.sharding import Network
from trainer.errors import ConfigError
from trainer.loggers.progress import NullProgress
from trainer.loop.fit import Callbacks, fit
from trainer.optimizers import make_optimizer
from trainer.seeding import StepRandom

pytestmark = pytest.mark.usefixtures("group")


class Failing(Pull):
    """Fails in one training step, in a way of torch's or of its own; counts its steps."""

    def __init__(self, step: int, error: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.step, self.error, self.steps = step, error, 0

    def losses(self, model: nn.Module, batch: dict, random: StepRandom) -> torch.Tensor:
        self.steps += 1
        losses = super().losses(model, batch, random)
        return self.error(losses) if self.steps == self.step else losses


def of_shape(losses: torch.Tensor) -> torch.Tensor:
    return losses @ torch.ones(99, 2)


def of_index(losses: torch.Tensor) -> torch.Tensor:
    return nn.functional.embedding(torch.tensor([7]), losses[:, None])


def in_backward(losses: torch.Tensor) -> torch.Tensor:
    losses.register_hook(of_shape)
    return losses


def of_its_own(losses: torch.Tensor) -> torch.Tensor:
    raise ValueError("bad data")


@pytest.mark.parametrize(
    ("step", "error"),
    [(1, of_shape), (2, of_index), (2, in_backward), (1, of_its_own)],
)
def test_what_does_not_fit_in_a_step_is_one_line_with_keys_step_and_place(
    step: int, error: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    run = make_run([[1.0], [1.0], [1.0]])
    run.task = Failing(step, error)
    with pytest.raises(ConfigError) as refused:
        train(run)
    line = rf"model, task, data: they do not fit together in step {step}: \w+Error: .*\(test_misfits\.py:\d+; .*\)"
    assert re.fullmatch(line, str(refused.value)), refused.value


def test_an_optimizer_that_fails_is_named() -> None:
    run = make_run([[1.0]])
    run.optimizer = make_optimizer(run.network.module, OptimizerConfig(name="SGD", lr=1e308))
    with pytest.raises(
        ConfigError, match=r"^optimizer: it fails in step 1: RuntimeError: value cannot be conv"
    ):
        train(run)


def test_what_does_not_fit_in_an_evaluation_is_one_line_too() -> None:
    run = make_run([[1.0]])

    def evaluate(network: Network, bank: EMABank) -> dict[str, float]:
        return {"loss": float(of_index(torch.ones(3)))}

    with pytest.raises(
        ConfigError, match=r"^model, task, data, metrics: .* in the evaluation after step 1: IndexE"
    ):
        fit(run, Callbacks(evaluate, Recorder(), NullProgress(), lambda run, last: None, lambda: False))


def of_its_own_in_one_line(losses: torch.Tensor) -> torch.Tensor:
    if losses.numel(): raise ValueError("bad data")  # fmt: skip  # noqa: E701
    return losses


@pytest.mark.parametrize("error", [of_its_own, of_its_own_in_one_line])
def test_what_own_code_raises_after_the_first_step_passes_unchanged(
    error: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    run = make_run([[1.0], [1.0], [1.0]])
    run.task = Failing(2, error)
    with pytest.raises(ValueError, match=r"^bad data$"):
        train(run)


def test_a_lack_of_memory_is_no_misfit() -> None:
    def full(losses: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    run = make_run([[1.0]])
    run.task = Failing(1, full)
    with pytest.raises(torch.OutOfMemoryError):
        train(run)


def test_a_parameter_without_a_gradient_is_named_once_and_the_run_goes_on() -> None:
    run = make_run([[1.0], [1.0]])
    run.network.module.register_parameter("spare", nn.Parameter(torch.ones(2)))
    run.optimizer.add_param_group({"params": [run.network.module.spare]})
    run.bank = EMABank(run.network.module, {"0.5": EMAConfig(decay=0.5)})
    notes: list[str] = []
    display = NullProgress()
    display.note = notes.append  # type: ignore[method-assign]
    fit(run, Callbacks(lambda network, bank: {}, Recorder(), display, lambda run, last: None, lambda: False))
    assert notes == ["warning: model: the loss gives no gradient to spare; they stay as they are"]
    assert run.step == 2 and run.network.module.spare.tolist() == [1, 1]
