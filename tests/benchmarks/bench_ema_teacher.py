"""What a forward with the weights of an average costs, against a live forward without gradients."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ema import EMAConfig, ExponentialMovingAverage
from models.gpt import GPT
from models.resnet import ResNet
from tests.benchmarks.bench_ema_bank import allocated
from tests.benchmarks.bench_ema_figures import Figure, Target, milliseconds, threads_text
from tests.benchmarks.bench_ema_models import DECAY, count, gpt_23m
from tests.benchmarks.rounds import interleave, ratio

LIVE, TEACHER = "a live forward", "a teacher forward"
Case = Callable[[], tuple[nn.Module, Tensor]]
"""Makes a model and its input."""


def quickstart_gpt() -> tuple[nn.Module, Tensor]:
    """The size of the quickstart, one batch."""
    model = GPT(vocab_size=256, context=128, n_layer=4, n_head=4, n_embd=128)
    return model, torch.randint(256, (8, 128))


def middle_gpt() -> tuple[nn.Module, Tensor]:
    """23 M parameters, one sequence."""
    return gpt_23m(), torch.randint(8192, (1, 512))


def resnet() -> tuple[nn.Module, Tensor]:
    """A small network with BatchNorm, whose buffers are copied for the call."""
    return ResNet(1, 10, [16, 32, 64], 1), torch.randn(256, 1, 8, 8)


def teacher(threads: int, rounds: int, cases: Mapping[str, Case] | None = None) -> list[Figure]:
    """A teacher forward against the same forward with the live weights, both in evaluation mode without gradients."""
    torch.set_num_threads(threads)
    lines = []
    for make in (cases or {"small": quickstart_gpt, "resnet": resnet, "23 M": middle_gpt}).values():
        lines += _teacher(*make(), threads, rounds)
    return lines


def _teacher(model: nn.Module, inputs: Tensor, threads: int, rounds: int) -> list[Figure]:
    model.eval()
    average = ExponentialMovingAverage(model, EMAConfig(decay=DECAY))
    average.update(model, iteration=0)

    @torch.no_grad()
    def live() -> object:
        return model(inputs)

    def taught() -> object:
        return average.forward(model, inputs)

    taught()
    extra = allocated(taught)[0] - allocated(live)[0]
    times = interleave({LIVE: live, TEACHER: taught}, rounds)
    setting = f"{type(model).__name__}, {count(model):,} parameters, {threads_text(threads)}"
    return [
        *(Figure(setting, name, ms=milliseconds(own)) for name, own in times.items()),
        Figure(setting, f"{TEACHER} / {LIVE}", ratio(times[TEACHER], times[LIVE]), target=Target(1.1)),
        Figure(setting, "more memory than a live forward", float(extra), "bytes"),
    ]
