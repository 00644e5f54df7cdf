"""Generating images by rectified flow.

Noise and image are joined by a straight line, x_t = (1 - t) x_0 + t noise; the model learns the velocity
noise - x_0, and following it from t = 1 to t = 0 makes an image (Liu et al., "Flow Straight and Fast", 2022;
Lipman et al., "Flow Matching for Generative Modeling", 2022).
"""

from collections.abc import Collection
from typing import ClassVar

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.protocols import Batch, SampleRandom
from trainer.tasks.set_metrics import squared_mmd

_TIMES = ("uniform", "logit_normal")


class FlowMatching:
    """Mean squared error of the velocity.

    The model is called with x_t `[b, c, h, w]`, times `[b]` in [0, `time_scale`] and, if `class_conditional`,
    classes int64 `[b]`; it answers with a velocity of the shape of x_t, or with an object that has it as
    `.sample`, as the models of diffusers do. `SampleRandom` decides on which device times and noise are.

    Args:
        image_shape: channels, height and width of the generated images.
        num_classes: classes to draw images of; 0 only without `class_conditional`.
        class_conditional: whether the model gets the class as an input.
        time_density: density of t in training: `uniform`, or `logit_normal` (Esser et al., 2024), which
            favours the middle.
        time_scale: what t = 1 is for the model; 1000 suits embeddings made for a thousand diffusion steps.
        eval_times: forwards per sample in an evaluation, each with t in its own one of as many equal parts of
            [0, 1]. More of them make the loss less noisy and the evaluation slower.
        distance_steps: Euler steps, that is forwards, to an image for each evaluation sample, of its class; evaluations
            then give `mmd2`, how far the distribution of these images is from that of the real ones, pixel by pixel.
            For small images and up to some thousand samples, whose pairs are all looked at; 0 leaves it out.
        sample_steps: Euler steps, that is forwards, from noise to an image of the grid.
        sample_count: images that the trainer draws; `images` makes as many as its random numbers have rows.

    Raises:
        ConfigError: an argument is out of range.
    """

    primary_metric = "loss"
    higher_is_better: Collection[str] = ()
    biased = ()
    metric_units: ClassVar = {"loss": "mean squared error", "mmd2": "squared MMD"}

    def __init__(
        self,
        image_shape: list[int],
        num_classes: int = 0,
        class_conditional: bool = True,
        time_density: str = "uniform",
        time_scale: float = 1000.0,
        eval_times: int = 4,
        distance_steps: int = 0,
        sample_steps: int = 50,
        sample_count: int = 100,
    ) -> None:
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ConfigError(f"task.image_shape: {image_shape} is not [channels, height, width]")
        if class_conditional and num_classes < 1:
            raise ConfigError(
                f"task.num_classes: {num_classes} is not at least 1, with task.class_conditional=true"
            )
        if time_density not in _TIMES:
            raise ConfigError(f"task.time_density: {time_density} is neither uniform nor logit_normal")
        if not time_scale > 0:
            raise ConfigError(f"task.time_scale: {time_scale} is not above 0")
        counts = {"eval_times": eval_times, "sample_steps": sample_steps, "sample_count": sample_count}
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"task.{name}: {count} is not at least 1")
        if distance_steps < 0:
            raise ConfigError(f"task.distance_steps: {distance_steps} is not at least 0")
        self.sample_count = sample_count
        self._image_shape, self._num_classes = image_shape, num_classes
        self._class_conditional = class_conditional
        self._time_density, self._time_scale = time_density, time_scale
        self._eval_times, self._distance_steps, self._sample_steps = eval_times, distance_steps, sample_steps

    def losses(self, model: nn.Module, batch: Batch, random: SampleRandom) -> Tensor:
        """Mean squared error of each sample at one random time, per pixel and channel, float32 `[b]`."""
        times = random.normal().sigmoid() if self._time_density == "logit_normal" else random.uniform()
        return self._error(model, batch, times, random)

    def metrics(self, model: nn.Module, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        """`loss`: the error averaged over `eval_times` stratified times, uniform whatever training drew.

        Strata take most of the noise of the time out of the mean, and one density keeps runs comparable. With
        `distance_steps`, also real and generated images, `[b, *image_shape]`, for `set_metrics`.
        """
        errors = [
            self._error(model, batch, (part + random.uniform()) / self._eval_times, random)
            for part in range(self._eval_times)
        ]
        found = {"loss": torch.stack(errors).mean(0)}
        if self._distance_steps:
            noise = random.normal(*self._image_shape)
            found["set/generated"] = self._generate(model, noise, batch.get("label"), self._distance_steps)
            found["set/real"] = batch["image"]
        return found

    def set_metrics(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Puts `mmd2` (`squared_mmd`) in the place of the images."""
        if "set/real" in values:
            values["mmd2"] = squared_mmd(values.pop("set/real"), values.pop("set/generated"))
        return values

    @torch.no_grad()
    def images(self, model: nn.Module, random: SampleRandom) -> Tensor:
        """Images made from noise, float32 `[samples, *image_shape]` in [0, 1].

        Image i is of class i % num_classes: with `num_classes` columns, every row shows each class once.

        Collectives: `sample_steps` forwards of the model. Under FSDP every rank must call this, with any rows.
        """
        noise = random.normal(*self._image_shape)
        classes = torch.arange(len(noise), device=noise.device) % max(self._num_classes, 1)
        return (self._generate(model, noise, classes, self._sample_steps) + 1) / 2

    def tokens_per_sample(self, batch: Batch) -> int:
        """0: an image has no tokens here."""
        return 0

    def _generate(self, model: nn.Module, noise: Tensor, classes: Tensor | None, steps: int) -> Tensor:
        """Images in [-1, 1], by Euler's method from t = 1 to t = 0."""
        x = noise
        for step in range(steps):
            time = x.new_full((len(x),), 1 - step / steps)
            x = x - self._velocity(model, x, time, classes) / steps
        return x.clamp(-1, 1)

    def _error(self, model: nn.Module, batch: Batch, times: Tensor, random: SampleRandom) -> Tensor:
        image = batch["image"]
        noise = random.normal(*image.shape[1:])
        t = times.view(-1, 1, 1, 1)
        velocity = self._velocity(model, (1 - t) * image + t * noise, times, batch.get("label"))
        return (velocity - (noise - image)).square().flatten(1).mean(1)

    def _velocity(self, model: nn.Module, x: Tensor, times: Tensor, classes: Tensor | None) -> Tensor:
        scaled = times * self._time_scale
        output = model(x, scaled, classes) if self._class_conditional else model(x, scaled)
        velocity: Tensor = getattr(output, "sample", output)
        if velocity.shape != x.shape:
            raise ConfigError(
                f"model: answers {tuple(x.shape)} with {tuple(velocity.shape)}, expected the same shape"
            )
        return velocity.float()
