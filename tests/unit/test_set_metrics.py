"""Metrics of a whole evaluation set: their value, and a value per sample that carries their standard error.

Expected values: torchmetrics for perplexity and calibration error; the definition as a double loop for the MMD (Gretton
et al., 2012, equation 4); every sample left out in turn, and Efron's formula, for the jackknife; the delta method for
what its error is worth.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ema import EMABank, EMAConfig
from tests.makers import Deferred, five_samples, normal
from trainer.distributed.sharding import Network
from trainer.errors import ConfigError
from trainer.evaluation.custom import CustomMetric
from trainer.evaluation.evaluation import EvalBatch, Evaluation
from trainer.evaluation.first_forward import try_forwards
from trainer.protocols import JudgesSets
from trainer.seeding import StepRandom
from trainer.tasks import set_metrics
from trainer.tasks.classification import Classification
from trainer.tasks.flow_matching import FlowMatching
from trainer.tasks.language_modeling import LanguageModeling
from trainer.tasks.set_metrics import calibration_error, jackknifed, perplexity, ratio, squared_mmd

torchmetrics = Deferred("torchmetrics")


def their_calibration_error(logits: Tensor, label: Tensor) -> Tensor:
    error = torchmetrics.functional.classification.multiclass_calibration_error
    return error(logits.softmax(-1), label, num_classes=10)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def predictions(samples: int, classes: int) -> tuple[Tensor, Tensor]:
    logits = 2 * normal(samples, classes)
    return logits, torch.randint(classes, (samples,), generator=generator(1))


def calibration(samples: int = 60) -> tuple[Tensor, Tensor]:
    logits, label = predictions(samples, 5)
    confidence, choice = logits.softmax(-1).max(-1)
    return confidence, (choice == label).double()


CASES = {
    "perplexity": (perplexity, (normal(40).exp(),)),
    "ratio": (ratio, (normal(40).exp(), normal(40, seed=1).exp())),
    "calibration_error": (calibration_error, calibration()),
    "squared_mmd": (squared_mmd, (normal(30, 2, 3), normal(30, 2, 3, seed=1) + 0.3)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_values_have_the_metric_as_mean_and_the_jackknife_as_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric, samples = CASES[name]
    count = len(samples[0])
    if name == "squared_mmd":
        # The width of the kernel is a constant of the real samples, and not estimated again without one of them.
        width = torch.pdist(samples[0].flatten(1)).median()
        monkeypatch.setattr(torch, "pdist", lambda x: width[None])
    values = metric(*samples)
    assert values.shape == (count,)
    rest = [[j for j in range(count) if j != i] for i in range(count)]
    without = torch.stack([metric(*(sample[kept] for sample in samples)).mean() for kept in rest])
    error = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt()
    assert float(values.std() / count**0.5) == pytest.approx(float(error), rel=1e-9)
    expected = float(values.mean()) + (count - 1) * (without.mean() - without)
    assert torch.allclose(values, expected, rtol=1e-9)


def test_of_a_mean_the_values_are_the_samples_themselves() -> None:
    values = normal(20)
    without = torch.stack([values[torch.arange(20) != i].mean() for i in range(20)])
    assert torch.allclose(jackknifed(values.mean(), without), values)


def test_perplexity_is_that_of_torchmetrics_and_its_error_that_of_the_delta_method() -> None:
    logits = normal(400, 12, 7)
    tokens = torch.randint(7, (400, 12), generator=generator(2))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    loss = loss.view(400, 12).mean(1)
    values = perplexity(loss)
    theirs = torchmetrics.functional.text.perplexity(logits, tokens)
    assert float(values.mean()) == pytest.approx(float(theirs), rel=1e-6)
    assert float(values.mean()) == pytest.approx(math.exp(loss.mean()), rel=1e-12)
    assert float(values.std()) == pytest.approx(float(values.mean() * loss.std()), rel=0.01)


@pytest.mark.parametrize("samples", [7, 1000])
def test_calibration_error_is_that_of_torchmetrics(samples: int) -> None:
    logits, label = predictions(samples, 10)
    confidence, choice = logits.softmax(-1).max(-1)
    found = calibration_error(confidence, (choice == label).double()).mean()
    expected = their_calibration_error(logits, label)
    assert float(found) == pytest.approx(float(expected), abs=1e-6)


def test_certain_and_wrong_is_as_badly_calibrated_as_can_be() -> None:
    one = torch.ones(5, dtype=torch.float64)
    assert float(calibration_error(one, 0 * one).mean()) == 1
    assert float(calibration_error(one, one).mean()) == 0


def test_a_confidence_on_an_edge_belongs_to_the_bin_above() -> None:
    edge = float(torch.linspace(0, 1, 16, dtype=torch.float64)[3])
    found = calibration_error(torch.tensor([edge, edge + 0.02]).double(), torch.tensor([1.0, 0.0]).double())
    assert float(found.mean()) == pytest.approx((0.8 - 0.22) / 2, abs=1e-6)  # apart, they would add up


@pytest.mark.parametrize("block", [1024, 7])
def test_squared_mmd_is_its_definition(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(20, 3), normal(20, 3, seed=1) + 1
    if block == 1024:
        width = float(torch.pdist(x).median())
    else:
        width = float(torch.pdist(x[:block]).median())
        monkeypatch.setattr(set_metrics, "BLOCK", block)

    def k(a: Tensor, b: Tensor) -> float:
        return math.exp(-float((a - b).square().sum()) / (2 * width**2))

    pairs = [
        k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i])
        for i in range(20)
        for j in range(20)
        if i != j
    ]
    assert float(squared_mmd(x, y).mean()) == pytest.approx(sum(pairs) / (20 * 19), rel=1e-9)


def test_squared_mmd_finds_a_planted_distance_and_only_that() -> None:
    """Unbiased: over 200 pairs of sets of one distribution, its mean is 0 within its error."""
    alike = [squared_mmd(normal(40, 2, seed=2 * n), normal(40, 2, seed=2 * n + 1)).mean() for n in range(200)]
    found = torch.stack(alike)
    assert abs(float(found.mean())) < 3 * float(found.std()) / 200**0.5
    apart = squared_mmd(normal(200, 2, seed=1), normal(200, 2, seed=2) + 1)
    assert float(apart.mean()) > 5 * float(apart.std()) / 200**0.5


def test_the_error_of_a_squared_mmd_is_its_spread_over_other_samples() -> None:
    sets = [squared_mmd(normal(60, 2, seed=2 * n), normal(60, 2, seed=2 * n + 1) + 1) for n in range(200)]
    spread = np.std([float(values.mean()) for values in sets], ddof=1)
    told = np.mean([float(values.std()) / 60**0.5 for values in sets])
    assert told == pytest.approx(spread, rel=0.2)


def test_where_no_error_can_be_told_the_metric_is_itself_for_every_sample() -> None:
    """Two samples leave no MMD without one of them; exp(1000) is no float; one sample has no byte."""
    x = torch.tensor([[0.0], [1.0]]).double()
    # k(0, 1) = k(1, 2) = exp(-1 / 2) with width 1; k(0, 2) = exp(-2), k(1, 1) = 1
    expected = 2 * math.exp(-0.5) - math.exp(-2) - 1
    assert squared_mmd(x, x + 1).tolist() == pytest.approx([expected] * 2)
    assert perplexity(torch.tensor([1.0, 2000.0]).double()).tolist() == [math.inf] * 2
    assert ratio(torch.tensor([1.0, 2.0]).double(), torch.tensor([0.0, 4.0]).double()).tolist() == [0.75] * 2


def test_bits_per_byte_are_all_bits_by_all_bytes() -> None:
    """Uniform over 256 tokens: 8 bits a token; samples of 16 tokens stand for 16, 32 and 48 bytes."""

    class Uniform(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.zeros(*tokens.shape, 256)

    batch = {"tokens": torch.randint(256, (3, 17)), "bytes": torch.tensor([16, 32, 48])}
    task = LanguageModeling()
    assert isinstance(task, JudgesSets)
    found = task.metrics(Uniform(), batch, StepRandom(0, 0, 0, 3, 3))
    judged = task.set_metrics({name: values.double() for name, values in found.items()})
    assert list(judged) == ["loss", "accuracy", "perplexity", "bits_per_byte"]
    assert float(judged["bits_per_byte"].mean()) == pytest.approx(3 * 16 * 8 / 96)
    assert float(judged["perplexity"].mean()) == pytest.approx(256)
    del batch["bytes"]
    assert "bits_per_byte" not in task.set_metrics(task.metrics(Uniform(), batch, StepRandom(0, 0, 0, 3, 3)))


def test_classification_is_judged_by_its_calibration() -> None:
    task = Classification()
    logits, label = predictions(50, 10)
    batch = {"image": logits, "label": label}
    judged = task.set_metrics(task.metrics(nn.Identity(), batch, StepRandom(0, 0, 0, 50, 50)))
    assert list(judged) == ["loss", "accuracy", "ece"] and task.biased == ("ece",)
    expected = their_calibration_error(logits, label)
    assert float(judged["ece"].mean()) == pytest.approx(float(expected), abs=1e-6)


def test_a_flow_that_makes_the_real_images_is_at_no_distance() -> None:
    """Two classes with one image each; the exact velocity of a class ends at its image, another ends elsewhere."""
    classes = torch.arange(40) % 2
    of_class = torch.stack([torch.full((1, 2, 2), -0.5), torch.full((1, 2, 2), 0.5)])
    batch = {"image": of_class[classes], "label": classes}
    task = FlowMatching([1, 2, 2], 2, time_scale=1.0, distance_steps=4)

    class Exact(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = shift

        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            return (x - of_class[label] - self.shift) / t.view(-1, 1, 1, 1)

    def judged(shift: float) -> dict[str, Tensor]:
        found = task.metrics(Exact(shift), batch, StepRandom(0, 0, 0, 40, 40))
        return task.set_metrics({name: values.double() for name, values in found.items()})

    assert list(judged(0.0)) == ["loss", "mmd2"]
    assert float(judged(0.0)["mmd2"].mean()) == pytest.approx(0, abs=1e-6)
    # The images are 2 apart, the median; each is missed by 0.6. Of 39 others, 19 are of a sample's own class.
    of_own = 2 - 2 * math.exp(-(0.6**2) / 8)
    of_other = 2 * math.exp(-(2**2) / 8) - math.exp(-(2.6**2) / 8) - math.exp(-(1.4**2) / 8)
    expected = (19 * of_own + 20 * of_other) / 39
    assert float(judged(0.3)["mmd2"].mean()) == pytest.approx(expected, rel=1e-5)
    same_loss = FlowMatching([1, 2, 2], 2, time_scale=1.0).metrics(
        Exact(0.3), batch, StepRandom(0, 0, 0, 40, 40)
    )
    assert torch.equal(same_loss["loss"].double(), judged(0.3)["loss"])


class Squares:
    """A task whose metric of the set is the square of a mean; its ingredient is a matrix per sample."""

    primary_metric = "square"
    biased = ()

    def metrics(self, model: nn.Module, batch: dict, random: StepRandom) -> dict[str, Tensor]:
        return {"set/twice": model(batch["x"]).unsqueeze(1).expand(-1, 2, -1)}

    def set_metrics(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        assert values["set/twice"].shape == (5, 2, 1)
        x = values["set/twice"].mean((1, 2))
        return {"square": jackknifed(x.mean().square(), ((x.sum() - x) / 4).square())}


def own(values: Tensor) -> dict[str, CustomMetric]:
    return {"square": CustomMetric(lambda model, batch, random: values)}


def test_a_metric_of_ones_own_stands_beside_those_of_the_set(group: None) -> None:
    """Also where the task's primary metric is one of the set, and under the name of what that is made of."""
    module = nn.Linear(1, 1, bias=False)
    net = Network(module, module, None, torch.device("cpu"))
    metrics = {"twice": CustomMetric(lambda model, batch, random: batch["x"][:, 0])}
    record = Evaluation(Squares(), partial(five_samples, torch.clone), 5, metrics=metrics)(net, {})
    assert record["eval/live/twice"] == 2.0 and "eval/live/square" in record


@pytest.mark.parametrize(
    ("name", "is_one"), [("accuracy", True), ("own", True), ("ece", False), ("f1", False)]
)
def test_the_primary_metric_is_any_that_the_first_forward_gives_unless_it_is_biased(
    group: None, name: str, is_one: bool
) -> None:
    net = Network(nn.Flatten(), nn.Flatten(), None, torch.device("cpu"))
    batch = {"image": torch.eye(4).view(4, 1, 2, 2), "label": torch.arange(4)}
    item = EvalBatch(batch, torch.ones(4, dtype=torch.bool), torch.arange(4), StepRandom(0, 0, 0, 4, 4))
    metrics = {"own": CustomMetric(lambda model, batch, random: torch.zeros(4))}
    evaluation = Evaluation(Classification(primary_metric=name), lambda: [item], 4, metrics=metrics)
    first, _, faults = try_forwards(net, evaluation)
    assert first is batch
    text = f"task.primary_metric: expected one of loss, accuracy, own, got {name!r}"
    assert faults == [] if is_one else faults == [text]


def test_an_evaluation_judges_metrics_of_the_set_with_their_paired_gap(group: None) -> None:
    """Samples 0 to 4 times a weight w: the square of the mean is 4 w^2; live has w = 2, the average 1."""
    module = nn.Linear(1, 1, bias=False)
    net = Network(module, module, None, torch.device("cpu"))
    bank = EMABank(module, {"0.5": EMAConfig(decay=0.5)})
    nn.init.zeros_(module.weight)
    bank.update(module, iteration=1)
    nn.init.constant_(module.weight, 2.0)
    bank.update(module, iteration=2)  # the average is at 1
    record = Evaluation(Squares(), partial(five_samples, torch.clone), 5)(net, bank)
    assert record["eval/live/square"] == pytest.approx(16)
    assert record["eval/ema/0.5/square"] == pytest.approx(4)
    assert record["eval/gap/0.5/square"] == pytest.approx(12)
    x = torch.arange(5.0).double()
    without = 3 * ((10 - x) / 4).square()  # of the difference, 4 mean^2 - mean^2
    error = (4 / 5 * (without - without.mean()).square().sum()).sqrt()
    assert record["eval/gap/0.5/square_se"] == pytest.approx(float(error))
    with pytest.raises(ConfigError, match=r"metrics\.square: the task has a metric of this name"):
        Evaluation(Squares(), partial(five_samples, torch.clone), 5, metrics=own(torch.zeros(3))).of_the_set(
            {"set/twice": torch.zeros(5, 2, 1), "square": torch.zeros(5)}
        )
