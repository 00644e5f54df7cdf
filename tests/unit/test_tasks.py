"""Tasks: losses and metrics of models whose answer is known.

Expected values: uniform logits over 256 bytes cost ln 256 nats (8 bits); with smoothing e over k classes the target is
(1 - e) + e / k on the label and e / k elsewhere; a flow model that answers zero pays E (noise - x)^2 = 1 + x^2.
"""

import inspect
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.makers import random_of
from trainer.errors import ConfigError
from trainer.protocols import DrawsImages, Task
from trainer.seeding import StepRandom
from trainer.tasks.classification import Classification
from trainer.tasks.flow_matching import FlowMatching
from trainer.tasks.language_modeling import LanguageModeling

CONF = Path(__file__).parents[2] / "conf"
SHAPE = [1, 8, 8]


class Answer(nn.Module):
    """A model that answers with what a function of its inputs returns, and keeps its inputs."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self._function = function
        self.calls: list[tuple[Tensor, ...]] = []

    def forward(self, *inputs: Tensor) -> Any:
        self.calls.append(inputs)
        return self._function(*inputs)


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (LanguageModeling(), "language_modeling"),
        (Classification(), "classification"),
        (FlowMatching(SHAPE, 10), "flow_matching"),
    ],
)
def test_tasks_keep_the_protocol_and_their_yaml_lists_every_argument(task: Task, name: str) -> None:
    assert isinstance(task, Task)
    assert isinstance(task, DrawsImages) == (name == "flow_matching")
    choice = yaml.safe_load((CONF / "task" / f"{name}.yaml").read_text())
    kind = type(task)
    assert choice.pop("_target_") == f"trainer.tasks.{name}.{kind.__name__}"
    parameters = dict(inspect.signature(kind).parameters)
    if name == "language_modeling":  # has no key, so that an own target fits in place of its own
        parameters = {}
    assert list(choice) == list(parameters)
    for key, value in choice.items():
        default = parameters[key].default
        assert value in ("???", list(default) if isinstance(default, tuple) else default)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: SimpleNamespace(logits=x)], ids=["tensor", "object"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uniform_logits_over_bytes_cost_ln_256_nats(wrap: Any, dtype: torch.dtype) -> None:
    batch = {"tokens": torch.randint(256, (3, 17))}
    model = Answer(lambda tokens: wrap(torch.zeros(*tokens.shape, 256, dtype=dtype)))
    task = LanguageModeling()
    losses = task.losses(model, batch, random_of(3))
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([math.log(256)] * 3)
    metrics = task.metrics(model, batch, random_of(3))
    assert metrics["loss"].tolist() == losses.tolist()
    assert torch.equal(model.calls[0][0], batch["tokens"][:, :-1])
    assert task.tokens_per_sample(batch) == 16


def test_the_target_is_the_next_token() -> None:
    tokens = torch.arange(12).repeat(2, 1)
    tokens[1, 6] = 100

    def successor(inputs: Tensor) -> Tensor:
        return nn.functional.one_hot(inputs + 1, 256) * 1000.0

    metrics = LanguageModeling().metrics(Answer(successor), {"tokens": tokens}, random_of(2))
    # In the second sample 5 -> 100 and 100 -> 7 are wrong, 2 of 11, each at a cost of 1000 nats.
    assert metrics["accuracy"].tolist() == pytest.approx([1, 9 / 11])
    assert metrics["loss"].tolist() == pytest.approx([0, 2000 / 11])


def test_language_modeling_losses_reach_the_model() -> None:
    model = nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 256))
    batch = {"tokens": torch.randint(256, (4, 9))}
    losses = LanguageModeling().losses(model, batch, random_of(4))
    expected = torch.stack(
        [nn.functional.cross_entropy(model(sample[:-1]), sample[1:]) for sample in batch["tokens"]]
    )
    assert torch.allclose(losses, expected)
    losses.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: SimpleNamespace(logits=x)], ids=["tensor", "object"])
def test_classification_smooths_labels_in_training_only(wrap: Any) -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
    batch = {"image": torch.zeros(2, 1, 2, 2), "label": torch.tensor([0, 3])}
    model = Answer(lambda image: wrap(logits))
    task = Classification(label_smoothing=0.2)
    log_z = math.log(math.exp(2) + 3)
    losses = task.losses(model, batch, random_of(2))
    assert losses.tolist() == pytest.approx([log_z - 0.85 * 2, log_z - 0.05 * 2])
    metrics = task.metrics(model, batch, random_of(2))
    assert metrics["loss"].tolist() == pytest.approx([log_z - 2, log_z])
    assert metrics["accuracy"].tolist() == [1, 0]
    assert torch.equal(model.calls[0][0], batch["image"])
    assert task.tokens_per_sample(batch) == 0


def test_the_primary_metric_knows_its_direction() -> None:
    assert Classification().primary_metric == "loss"
    assert Classification(primary_metric="accuracy").primary_metric == "accuracy"
    assert [metric in Classification().higher_is_better for metric in ("loss", "accuracy")] == [False, True]


def oracle(image: Tensor, time_scale: float) -> Any:
    """The exact velocity when all images are `image`: x_t = (1 - t) x_0 + t noise, so noise - x_0 = (x_t - x_0) / t."""
    return lambda x, t, *label: (x - image) / (t / time_scale).view(-1, 1, 1, 1)


@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
@pytest.mark.parametrize("time_scale", [1.0, 1000.0])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: SimpleNamespace(sample=x)], ids=["tensor", "object"])
def test_an_oracle_has_no_flow_matching_loss(density: str, time_scale: float, wrap: Any) -> None:
    image = torch.rand(1, *SHAPE) * 2 - 1
    batch = {"image": image.expand(64, *SHAPE), "label": torch.arange(64) % 10}
    task = FlowMatching(SHAPE, 10, time_density=density, time_scale=time_scale)
    velocity = oracle(image, time_scale)
    model = Answer(lambda x, t, label: wrap(velocity(x, t)))
    # The oracle divides by t: where t is small it multiplies float32 rounding.
    assert task.losses(model, batch, random_of(64)).max() < 1e-5
    assert task.metrics(model, batch, random_of(64))["loss"].max() < 1e-5
    assert all(torch.equal(label, batch["label"]) for _, _, label in model.calls)


def test_a_model_that_answers_zero_pays_one_plus_the_image_squared() -> None:
    batch = {"image": torch.full((512, *SHAPE), 0.5), "label": torch.zeros(512, dtype=torch.int64)}
    model = Answer(lambda x, t, label: torch.zeros_like(x))
    task = FlowMatching(SHAPE, 10)
    # (noise - 1/2)^2 has mean 1.25 and variance 2 + 4/4 = 3; there are 512 * 64 of them.
    error = (3 / (512 * 64)) ** 0.5
    losses = task.losses(model, batch, random_of(512))
    assert losses.shape == (512,)
    assert losses.dtype == torch.float32
    assert abs(losses.mean() - 1.25) < 5 * error
    assert abs(task.metrics(model, batch, random_of(512))["loss"].mean() - 1.25) < 5 * error


def times(task: FlowMatching, method: str, count: int = 4096) -> list[Tensor]:
    model = Answer(lambda x, t: torch.zeros_like(x))
    getattr(task, method)(model, {"image": torch.zeros(count, 1, 1, 1)}, random_of(count))
    return [t / 10 for _, t in model.calls]


def flow(**arguments: Any) -> FlowMatching:
    return FlowMatching([1, 1, 1], class_conditional=False, time_scale=10.0, **arguments)


def test_training_times_have_the_density_that_was_asked_for() -> None:
    (uniform,) = times(flow(), "losses")
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    # The standard error of a quantile of 4096 uniform numbers is at most 1/128.
    assert (uniform.quantile(quantiles) - quantiles).abs().max() < 5 / 128
    (logit_normal,) = times(flow(time_density="logit_normal"), "losses")
    expected = torch.special.ndtri(quantiles).sigmoid()
    assert (logit_normal.quantile(quantiles) - expected).abs().max() < 5 / 128
    assert abs(logit_normal.logit().std() - 1) < 5 / 90


@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
def test_evaluation_times_are_stratified(density: str) -> None:
    strata = times(flow(time_density=density, eval_times=4), "metrics")
    assert len(strata) == 4
    for part, stratum in enumerate(strata):
        assert part / 4 <= stratum.min()
        assert stratum.max() <= (part + 1) / 4
        assert abs(stratum.mean() - (part + 0.5) / 4) < 5 * 12**-0.5 / 4 / 64


def test_evaluating_twice_gives_the_same_numbers_and_another_layout_too() -> None:
    batch = {"image": torch.rand(12, *SHAPE), "label": torch.arange(12) % 10}
    model = Answer(lambda x, t, label: x * t.view(-1, 1, 1, 1))
    task = FlowMatching(SHAPE, 10)
    whole = task.metrics(model, batch, random_of(12))["loss"]
    assert torch.equal(task.metrics(model, batch, random_of(12))["loss"], whole)
    rows = torch.tensor([9, 10, 11, 11])
    part = {name: tensor[rows] for name, tensor in batch.items()}
    assert torch.equal(task.metrics(model, part, StepRandom(0, 1, total=12, rows=rows))["loss"], whole[rows])


def test_sampling_along_the_oracle_ends_at_the_image() -> None:
    image = torch.rand(1, *SHAPE) * 2 - 1
    model = Answer(oracle(image, 1000.0))
    task = FlowMatching(SHAPE, 10, sample_steps=7, sample_count=30)
    images = task.images(model, random_of(task.sample_count))
    # The path is a straight line, so Euler steps of any size are exact.
    assert torch.allclose(images, ((image + 1) / 2).expand(30, *SHAPE), atol=1e-5)
    assert len(model.calls) == 7
    assert model.calls[0][1].tolist() == [1000.0] * 30
    assert model.calls[-1][1].tolist() == pytest.approx([1000.0 / 7] * 30)
    assert model.calls[0][2].tolist() == list(range(10)) * 3


def test_samples_are_in_range_whatever_the_model_does() -> None:
    model = Answer(lambda x, t: -5 * x)
    images = FlowMatching(SHAPE, class_conditional=False).images(model, random_of(4))
    assert images.shape == (4, *SHAPE)
    assert (images.min(), images.max()) == (0, 1)


def test_a_model_of_the_wrong_output_shape_is_refused() -> None:
    batch = {"image": torch.zeros(4, *SHAPE), "label": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ConfigError, match=r"model: .*\(4, 2, 8, 8\)"):
        FlowMatching(SHAPE, 10).losses(Answer(lambda x, t, y: torch.cat([x, x], 1)), batch, random_of(4))


def test_tasks_work_on_whatever_device_the_batch_is_on() -> None:
    """The meta device refuses to be mixed with the CPU's tensors, as a GPU does."""
    random = StepRandom(0, 1, 0, 4, 4, device="meta")
    images = {"image": torch.zeros(4, *SHAPE), "label": torch.zeros(4, dtype=torch.int64)}
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    cases: list[tuple[Task, nn.Module, dict[str, Tensor]]] = [
        (LanguageModeling(), nn.Embedding(256, 256), {"tokens": torch.zeros(4, 9, dtype=torch.int64)}),
        (Classification(), classifier, images),
        (FlowMatching(SHAPE, 10), Answer(lambda x, t, label: x * (t + label).view(-1, 1, 1, 1)), images),
    ]
    for task, model, batch in cases:
        moved = {name: tensor.to("meta") for name, tensor in batch.items()}
        assert task.losses(model.to("meta"), moved, random).shape == (4,)
        for values in task.metrics(model, moved, random).values():
            assert values.device.type == "meta"
            assert values.shape == (4,)
        if isinstance(task, DrawsImages):
            assert task.images(model, random).device.type == "meta"


def guided(**arguments: Any) -> FlowMatching:
    return FlowMatching(SHAPE, 10, class_dropout=0.1, **arguments)


def by_class(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """A velocity that depends on the image, the time and the class, where 10 means no class."""
    return x * (label + 1).view(-1, 1, 1, 1) / 20 + (t / 1000).view(-1, 1, 1, 1)


def test_class_dropout_gives_that_share_of_training_images_no_class_and_keeps_times_and_noise() -> None:
    batch = {"image": torch.zeros(4096, *SHAPE), "label": torch.arange(4096) % 10}
    model = Answer(lambda x, t, label: torch.zeros_like(x))
    FlowMatching(SHAPE, 10).losses(model, batch, random_of(4096))
    FlowMatching(SHAPE, 10, class_dropout=0.25).losses(model, batch, random_of(4096))
    FlowMatching(SHAPE, 10, class_dropout=0.25).metrics(model, batch, random_of(4096))
    (_, plain_times, plain), (_, times, dropped), *evaluated = model.calls
    share = (dropped == 10).double().mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 4096) ** 0.5
    assert torch.equal(torch.where(dropped == 10, plain, dropped), plain)
    assert torch.equal(times, plain_times)
    assert all(torch.equal(label, plain) for _, _, label in evaluated)


def test_the_class_that_means_no_class_is_refused_in_training_data_too() -> None:
    batch = {"image": torch.zeros(2, *SHAPE), "label": torch.tensor([3, 10])}
    model = Answer(lambda x, t, label: torch.zeros_like(x))
    for call in (guided().losses, guided().metrics):
        with pytest.raises(ConfigError, match=r"^task.num_classes: expected more than 10"):
            call(model, batch, random_of(2))


def test_guidance_of_one_is_the_model_with_classes_and_of_zero_that_without() -> None:
    plain = FlowMatching(SHAPE, 10, sample_steps=4).images(Answer(by_class), random_of(20))
    task = guided(guidance=[0, 1, 3], sample_steps=4)
    assert torch.equal(task.images(Answer(by_class), random_of(20), 1), plain)
    without = Answer(lambda x, t, label: by_class(x, t, torch.full_like(label, 10)))
    expected = FlowMatching(SHAPE, 10, sample_steps=4).images(without, random_of(20))
    assert torch.equal(task.images(Answer(by_class), random_of(20), 0), expected)
    assert torch.equal(task.images(Answer(by_class), random_of(20)), expected)  # the first of the list

    def extrapolated(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        none = by_class(x, t, torch.full_like(label, 10))
        return none + 3 * (by_class(x, t, label) - none)

    expected = FlowMatching(SHAPE, 10, sample_steps=4).images(Answer(extrapolated), random_of(20))
    found = task.images(Answer(by_class), random_of(20), 3)
    assert torch.allclose(found, expected, atol=1e-6) and not torch.allclose(found, plain, atol=1e-2)


def test_every_scale_of_guidance_has_its_own_metrics_from_the_same_noise() -> None:
    batch = {"image": torch.rand(12, *SHAPE) * 2 - 1, "label": torch.arange(12) % 10}
    task = guided(
        guidance=[1, 2.5],
        distances=["frechet_distance", "precision", "mmd2"],
        distance_steps=2,
        generated_per_sample=3,
        primary_metric="frechet_distance_w2.5",
    )
    assert task.primary_metric == "frechet_distance_w2.5"
    assert task.higher_is_better == ["precision_w1", "precision_w2.5"]
    found = task.metrics(Answer(by_class), batch, random_of(12))
    assert found["set/generated_w2.5"].shape == (12, 3, *SHAPE)
    one = guided(guidance=2.5, distance_steps=2, generated_per_sample=3)
    alone = one.metrics(Answer(by_class), batch, random_of(12))
    assert torch.equal(alone["set/generated"], found["set/generated_w2.5"])
    judged = task.set_metrics({name: values.double() for name, values in found.items()})
    names = ("frechet_distance", "precision", "mmd2")
    assert list(judged) == ["loss", *(f"{name}_w{w}" for w in ("1", "2.5") for name in names)]
    assert all(values.shape == (12,) for values in judged.values())


def test_features_see_what_the_decoder_makes_of_latents_and_the_grid_shows_it() -> None:
    seen: list[Tensor] = []

    class Decoder(nn.Module):
        def forward(self, latents: Tensor) -> Any:
            assert not self.training
            return SimpleNamespace(sample=latents.mean(1, keepdim=True).repeat(1, 3, 2, 2))

    def features(pictures: Tensor) -> Tensor:
        seen.append(pictures)
        return pictures.mean((1, 2, 3))[:, None]

    task = FlowMatching(
        [2, 4, 4],
        10,
        distance_steps=2,
        sample_steps=2,
        distances=["frechet_distance"],
        features=features,
        decoder=Decoder(),
        latent_scale=0.5,
    )
    latents = torch.full((6, 2, 4, 4), 0.25)
    model = Answer(lambda x, t, label: x - 3)  # ends far outside [-1, 1], where latents may be
    found = task.metrics(model, {"image": latents, "label": torch.arange(6)}, random_of(6))
    assert torch.equal(seen[0], torch.full((6, 3, 8, 8), 0.5))
    assert found["set/real"].shape == (6, 1) and found["set/generated"].shape == (6, 1, 1)
    images = task.images(model, random_of(6))
    assert images.shape == (6, 3, 8, 8) and images.max() == 1
    flat = FlowMatching([2, 4, 4], 10, distance_steps=1, features=lambda pictures: pictures.mean())
    with pytest.raises(ConfigError, match=r"task\.features: expected a tensor of 6 rows, got \(\)"):
        flat.metrics(model, {"image": latents, "label": torch.arange(6)}, random_of(6))
    wrong = FlowMatching([2, 4, 4], 10, decoder=lambda latents: latents[0])
    with pytest.raises(ConfigError, match=r"task\.decoder: expected 6 pictures"):
        wrong.images(model, random_of(6))


def test_the_class_that_means_no_class_may_not_be_one_of_the_data() -> None:
    batch = {"image": torch.zeros(4, *SHAPE), "label": torch.tensor([0, 3, 10, 2])}
    with pytest.raises(ConfigError, match=r"task\.num_classes: expected more than 10"):
        guided().metrics(Answer(by_class), batch, random_of(4))


@pytest.mark.parametrize(
    ("build", "arguments", "key"),
    [
        (Classification, {"label_smoothing": 1.0}, "task.label_smoothing"),
        (FlowMatching, {"image_shape": [8, 8], "num_classes": 1}, "task.image_shape"),
        (FlowMatching, {"image_shape": [1, 0, 8], "num_classes": 1}, "task.image_shape"),
        (FlowMatching, {"image_shape": SHAPE}, "task.num_classes"),
        (FlowMatching, {"image_shape": SHAPE, "num_classes": 1, "time_density": "beta"}, "task.time_density"),
        (FlowMatching, {"image_shape": SHAPE, "num_classes": 1, "time_scale": 0.0}, "task.time_scale"),
        (FlowMatching, {"image_shape": SHAPE, "num_classes": 1, "eval_times": 0}, "task.eval_times"),
        (FlowMatching, {"image_shape": SHAPE, "num_classes": 1, "sample_steps": 0}, "task.sample_steps"),
        (FlowMatching, {"image_shape": SHAPE, "num_classes": 1, "sample_count": 0}, "task.sample_count"),
        (FlowMatching, {"image_shape": SHAPE, "num_classes": 1, "class_dropout": 1.0}, "task.class_dropout"),
        (FlowMatching, {"image_shape": SHAPE, "num_classes": 1, "guidance": 2.0}, "task.guidance"),
        (guided, {"guidance": []}, "task.guidance"),
        (guided, {"guidance": [1, "two"]}, "task.guidance"),
        (guided, {"guidance": [2, 2.0]}, "task.guidance"),
        (guided, {"distances": ["fid"]}, "task.distances"),
        (guided, {"generated_per_sample": 0}, "task.generated_per_sample"),
        (guided, {"latent_scale": 0.0}, "task.latent_scale"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(build: Any, arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: "):
        build(**arguments)
