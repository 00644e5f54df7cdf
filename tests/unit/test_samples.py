"""Images that a run draws: which tasks draw, and with which weights."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.build import sample_random
from trainer.config.schema import Config
from trainer.distributed.processes import Processes
from trainer.distributed.sharding import Network
from trainer.evaluation.custom import CustomMetric
from trainer.evaluation.samples import best_average, draw_samples


def no_values(model: nn.Module, batch: Any, random: Any) -> Tensor:
    raise NotImplementedError


class Own:
    """A user's task with a setting that has the name of a key of flow matching."""

    sample_count = 2
    guidance = 7.5

    def images(self, model: nn.Module, random: None) -> Tensor:
        return torch.full((self.sample_count, 1, 2, 2), self.guidance)


def test_a_task_of_ones_own_draws_without_scales_whatever_its_settings_are_called() -> None:
    module = nn.Linear(1, 1)
    run: Any = SimpleNamespace(
        task=Own(), network=Network(module, module, None, torch.device("cpu")), bank={}
    )
    drawn = draw_samples(run, SimpleNamespace(), lambda: None)  # type: ignore[arg-type, return-value]
    assert drawn is not None and list(drawn) == [""]
    assert drawn[""]["live"].tolist() == [[[[7.5, 7.5], [7.5, 7.5]]]] * 2


def test_live_weights_and_averages_draw_from_the_same_noise_wherever_it_comes_from() -> None:
    own: Any = Own()
    random = sample_random(Config(seed=3), own, Processes(0, 1, torch.device("cpu")))
    assert random is not None
    live, average = ((random().normal(2).tolist(), torch.randn(2).tolist()) for _ in range(2))
    assert live == average


@pytest.mark.parametrize(
    ("higher", "own", "best"),
    [
        ([], {}, "a"),
        (["loss"], {}, "b"),
        ([], {"loss": CustomMetric(no_values, None, True)}, "b"),
        ([], {"loss": CustomMetric(no_values)}, None),
    ],
    ids=["lower", "higher", "own metric", "no direction"],
)
def test_the_best_average_has_the_best_finite_value(
    higher: list[str], own: dict[str, CustomMetric], best: str | None
) -> None:
    task = SimpleNamespace(primary_metric="loss", higher_is_better=higher)
    evaluation: Any = SimpleNamespace(task=task, metrics=own)
    values = {"a": 1.0, "b": 2.0, "c": float("nan"), "d": float("-inf")}
    record = {f"eval/ema/{name}/loss": value for name, value in values.items()}
    assert best_average(record, [*values, "late"], evaluation) == best
    assert best_average(record, ["c", "late"], evaluation) is None
