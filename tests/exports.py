"""Run directories for tests of exports: models with what makes an export hard, and their averages."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ema import EMABank, EMAConfig
from launch.export import main
from tests.makers import save_checkpoint
from trainer.checkpoint.training_state import training_state
from trainer.config.frozen import freeze_config
from trainer.config.schema import Config, EMAGroupConfig
from trainer.rundir.directory import RunDir


class Tied(nn.Module):
    """A head that is the embedding, BatchNorm statistics, a frozen parameter and a buffer that is not saved."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.norm = nn.BatchNorm1d(width)
        self.scale = nn.Parameter(torch.full((), 2.0), requires_grad=False)
        self.register_buffer("scratch", torch.zeros(7), persistent=False)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight


class Counting(nn.Linear):
    """Its constructor computes with the values of tensors, as meta tensors do not allow."""

    def __init__(self, width: int = 2) -> None:
        super().__init__(width, int(torch.ones(width).sum()))


class Renaming(nn.Linear):
    """Saves its weight under another name than it has."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self._register_state_dict_hook(lambda module, state, *_: state.update(kernel=state.pop("weight")))
        self.register_load_state_dict_pre_hook(
            lambda module, state, *_: state.update(weight=state.pop("kernel"))
        )


class Wrapper(nn.Module):
    """Has a submodule whose name is one that wrappers add."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)


def save_run(
    folder: Path,
    model: nn.Module,
    *,
    decays: tuple[float, ...] = (0.5,),
    start_iter: int = 0,
    steps: tuple[int, ...] = (4,),
    wrapped: Any = None,
    ema: EMAGroupConfig | None = None,
    node: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[RunDir, EMABank]:
    """A run directory as the trainer leaves it after some steps of random changes.

    Its configuration has the class of the model and the arguments, or is `node`.
    """
    target = f"{type(model).__module__}.{type(model).__qualname__}"
    config = Config(model=node or {"_target_": target, **arguments}, ema=ema or EMAGroupConfig())
    run_dir = RunDir.create(
        folder / "run",
        config_yaml=freeze_config(config),
        overrides=[],
        meta={"git": {"commit": "c0ffee", "dirty": True}},
    )
    trained = model if wrapped is None else wrapped
    configs = {repr(decay): EMAConfig(decay=decay, start_iter=start_iter) for decay in decays}
    bank = EMABank(trained, configs)
    optimizer = torch.optim.SGD(model.parameters())
    generator = torch.Generator().manual_seed(0)
    for step in range(1, max(steps) + 1):
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.is_floating_point() and (tensor.requires_grad or tensor.ndim):
                    tensor += torch.randn(tensor.shape, generator=generator)
        bank.update(trained, iteration=step)
        if step in steps:
            averages = {name: average.state_dict() for name, average in bank.items()}
            state = {
                **training_state(trained, optimizer),
                "ema": averages,
                "progress": {"step": step, "skipped": 0, "averages": list(bank)},
            }
            save_checkpoint(run_dir.checkpoints, step, state, keep=9)
    return run_dir, bank


def export(run_dir: RunDir, *arguments: str) -> int:
    """The exit code of the command, which trusts the classes of these tests."""
    return main([str(run_dir.path), "allow_targets=[tests.]", *arguments])
