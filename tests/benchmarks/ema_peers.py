"""Other averages behind one face: each keeps the average of one model and can be told to update it.

All are set to one constant decay, one update a step, the first of which copies the live weights, so that they do the
same work. `float32` asks for a float32 shadow of a model in another dtype; who cannot keep one says why.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ema import EMAConfig, ExponentialMovingAverage
from tests.benchmarks.bench_ema_models import DECAY

PACKAGES = ("torch", "ema-pytorch", "diffusers", "torch-ema", "lightning")


class CannotError(Exception):
    """This peer does not do what was asked of it; the message says why."""


@dataclass
class Peer:
    """An average of one model, at work."""

    update: Callable[[], object]
    average: Callable[[], list[Tensor]]
    """The averaged parameters, in the order of the model's."""


Make = Callable[[nn.Module, bool], Peer]
"""From the live model, and whether the shadow must be float32 whatever the model is, to a peer."""


def ours(model: nn.Module, float32: bool = True) -> Peer:
    """The average of this repository, in its default dtype."""
    average = ExponentialMovingAverage(model, EMAConfig(decay=DECAY))
    names = [name for name, _ in model.named_parameters()]
    iteration = -1

    def update() -> None:
        nonlocal iteration
        iteration += 1
        average.update(model, iteration=iteration)

    def averaged() -> list[Tensor]:
        state = average.state_dict()
        return [state[name] for name in names]

    return Peer(update, averaged)


def torch_foreach(model: nn.Module, float32: bool) -> Peer:
    """torch's AveragedModel with its foreach function."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    if float32:
        average.float()
    return Peer(lambda: average.update_parameters(model), lambda: list(average.module.parameters()))


def torch_loop(model: nn.Module, float32: bool) -> Peer:
    """torch's AveragedModel with its function for one tensor at a time."""
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

    average = AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY))
    if float32:
        average.float()
    return Peer(lambda: average.update_parameters(model), lambda: list(average.module.parameters()))


def _ema_pytorch(model: nn.Module, float32: bool, *, use_foreach: bool) -> Peer:
    from ema_pytorch import EMA

    average = EMA(
        model,
        ema_model=copy.deepcopy(model).float() if float32 else None,
        beta=DECAY,
        min_value=DECAY,  # as high as beta: its warm-up is over before it begins
        update_after_step=0,
        update_every=1,
        include_online_model=False,
        use_foreach=use_foreach,
        coerce_dtype=float32,
    )
    return Peer(average.update, lambda: list(average.ema_model.parameters()))


def ema_pytorch_loop(model: nn.Module, float32: bool) -> Peer:
    """ema-pytorch as it comes."""
    return _ema_pytorch(model, float32, use_foreach=False)


def ema_pytorch_foreach(model: nn.Module, float32: bool) -> Peer:
    """ema-pytorch with `use_foreach`."""
    return _ema_pytorch(model, float32, use_foreach=True)


def _diffusers(model: nn.Module, float32: bool, *, foreach: bool) -> Peer:
    from diffusers.training_utils import EMAModel

    # min_decay as high as decay leaves nothing of its warm-up but the copy at the start.
    average = EMAModel(model.parameters(), decay=DECAY, min_decay=DECAY, foreach=foreach)
    if float32:
        average.to(dtype=torch.float32)
    return Peer(lambda: average.step(model.parameters()), lambda: average.shadow_params)


def diffusers_loop(model: nn.Module, float32: bool) -> Peer:
    """EMAModel as it comes."""
    return _diffusers(model, float32, foreach=False)


def diffusers_foreach(model: nn.Module, float32: bool) -> Peer:
    """EMAModel with `foreach`."""
    return _diffusers(model, float32, foreach=True)


def torch_ema(model: nn.Module, float32: bool) -> Peer:
    """torch-ema; it holds the parameters from its start and walks no model."""
    from torch_ema import ExponentialMovingAverage as TorchEMA

    average = TorchEMA(model.parameters(), decay=DECAY, use_num_updates=False)
    if float32:
        average.to(dtype=torch.float32)
    return Peer(average.update, lambda: average.shadow_params)


def lightning_callback(model: nn.Module, float32: bool) -> Peer:
    """Lightning's callback through its hooks, with a trainer that only counts."""
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging

    if float32:
        raise CannotError("its copy has the live dtype, and no option or method changes that")
    module = lightning.LightningModule()
    module.model = model
    callback, trainer = EMAWeightAveraging(decay=DECAY), SimpleNamespace(global_step=0)
    hooks: Any = callback
    hooks.setup(trainer, module, "fit")

    def update() -> None:
        trainer.global_step += 1
        hooks.on_train_batch_end(trainer, module, None, None, 0)

    return Peer(update, lambda: list(hooks._average_model.module.model.parameters()))


def model_optimizer(model: nn.Module, float32: bool) -> Peer:
    """What NVIDIA Model-Optimizer's `modelopt.torch.fastgen.ema` does on an unsharded model, restated.

    Each step walks the names, strips a prefix off each, looks its shadow up, and blends one tensor at a time.
    """

    def clean(name: str) -> str:
        return name.replace("_checkpoint_wrapped_module.", "")

    shadow = {clean(name): p.detach().clone().float() for name, p in model.named_parameters()}
    buffers = {clean(name): buffer.detach().clone() for name, buffer in model.named_buffers()}
    started = False

    @torch.no_grad()
    def update() -> None:
        nonlocal started
        for name, parameter in model.named_parameters():
            own = shadow[clean(name)]
            own.lerp_(parameter.detach().to(own.device, own.dtype), 1 - DECAY if started else 1.0)
        for name, buffer in model.named_buffers():
            buffers[clean(name)].copy_(buffer)
        started = True

    return Peer(update, lambda: list(shadow.values()))


def timm_v3(model: nn.Module, float32: bool) -> Peer:
    """What timm's ModelEmaV3 does, restated: one foreach lerp over the values of two state dicts made each step."""
    average = copy.deepcopy(model)
    if float32:
        average.float()
    started = False

    @torch.no_grad()
    def update() -> None:
        nonlocal started
        own: list[Tensor] = []
        live: list[Tensor] = []
        for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                own.append(mine)
                live.append(theirs)
            else:
                mine.copy_(theirs)
        torch._foreach_lerp_(own, live, 1 - DECAY if started else 1.0)
        started = True

    return Peer(update, lambda: list(average.parameters()))


PEERS: dict[str, Make] = {
    "torch AveragedModel, foreach": torch_foreach,
    "torch AveragedModel, avg_fn": torch_loop,
    "ema-pytorch": ema_pytorch_loop,
    "ema-pytorch, use_foreach": ema_pytorch_foreach,
    "diffusers EMAModel": diffusers_loop,
    "diffusers EMAModel, foreach": diffusers_foreach,
    "torch-ema": torch_ema,
    "Lightning EMAWeightAveraging": lightning_callback,
    "Model-Optimizer, restated": model_optimizer,
    "timm ModelEmaV3, restated": timm_v3,
}


def versions() -> dict[str, str]:
    """Of the packages that the peers come from."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
