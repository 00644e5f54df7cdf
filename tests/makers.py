"""What several test files build, change and compare: networks, sharded networks, states and run directories."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from ema import EMABank, EMAConfig, ExponentialMovingAverage
from trainer.checkpoint.places import prune
from trainer.checkpoint.writing import prepare, write
from trainer.config.compose import compose, to_config
from trainer.config.frozen import freeze_config
from trainer.config.schema import Config, LoggerConfig, OptimizerConfig, TrainerConfig
from trainer.data.batches import GlobalBatchSampler, train_batches
from trainer.distributed.processes import own_rank
from trainer.distributed.sharding import Network
from trainer.errors import ConfigError
from trainer.evaluation.evaluation import EvalBatch
from trainer.loggers import Loggers, make_loggers
from trainer.loop.fit import Run
from trainer.loop.step_metrics import TrainMetrics
from trainer.optimizers import make_optimizer
from trainer.protocols import Dataset
from trainer.rundir.directory import RunDir
from trainer.seeding import StepRandom


class Deferred:
    """A package of an extra, imported at the first use and not where tests are collected.

    Without the package all tests of the file that names it are skipped.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed", allow_module_level=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pytest asks each global what it is
            raise AttributeError(name)
        return getattr(import_module(self._name), name)


MODES = ("local_shard", "full_tensor")
"""Both ways in which an average of a sharded model may be kept."""

TINY_GPT = (
    "ema=constant",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=32",
    "model.context=32",
    "data.context=32",
    "data.max_bytes=200000",
    "trainer.global_batch_size=8",
    "trainer.eval_samples=16",
    "trainer.eval_batch_size=4",
    "trainer.num_threads=1",
    "+optimizer.args.foreach=true",  # as on a GPU; otherwise a sharded step takes ten times as long
    "logger=none",
)
"""Overrides that make the quickstart's model and data small enough for a test of one second."""


def network(seed: int | None = None) -> nn.Sequential:
    """A small network with parameters and BatchNorm buffers, the same one for the same seed."""
    if seed is not None:
        torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@torch.no_grad()
def shake(model: nn.Module, size: float = 1.0) -> None:
    """Move every parameter at random, as a step of training does."""
    for parameter in model.parameters():
        parameter.add_(size * torch.randn_like(parameter))


def averaged(model: nn.Module, config: EMAConfig | None = None) -> ExponentialMovingAverage:
    """An average, of decay 0.5 by default, that has absorbed the weights of a model at iteration 0."""
    average = ExponentialMovingAverage(model, config or EMAConfig(decay=0.5))
    average.update(model, iteration=0)
    return average


class Net(nn.Module):
    """A network with blocks to shard, and rows that ranks cannot share evenly (7, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.norm = nn.BatchNorm1d(5)
        self.wide = nn.Linear(5, 7)
        self.gate = nn.Linear(7, 1)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return self.gate(self.wide(self.norm(x))) * self.scale


class Tied(nn.Module):
    """A model with a head that is the embedding, as language models have, or its untied twin."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        if tie:
            self.head.weight = self.embed.weight


def shard(model: Net, layout: str) -> Net:
    """`none`, `fsdp`, `hsdp` (two replicas), or `partial`: the blocks sharded, the rest whole on every rank."""
    world = dist.get_world_size()
    if layout == "none":
        return model
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    if layout != "partial":
        fully_shard(model, mesh=mesh)
    return model


def networks(layout: str) -> tuple[Net, Net]:
    """A whole network and a sharded one with the same weights."""
    torch.manual_seed(0)
    whole = Net()
    sharded = Net()
    sharded.load_state_dict(whole.state_dict())
    return whole, shard(sharded, layout)


@torch.no_grad()
def shake_both(whole: Net, sharded: Net) -> None:
    """The same step for both, written where an optimizer writes: into the local shards."""
    reshard(sharded)
    pairs = zip(whole.parameters(), sharded.parameters(), strict=True)
    for left, right in pairs:
        step = torch.randn_like(left)
        left.add_(step)
        if isinstance(right, DTensor):
            step = distribute_tensor(step, right.device_mesh, right.placements, src_data_rank=None)
        right.add_(step)


def reshard(model: nn.Module) -> None:
    """Shard every FSDP2 module again that a forward left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full(tensor: Tensor) -> Tensor:
    """The whole tensor of one that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def no_collectives(expected: int = 0) -> Iterator[None]:
    """Count the collective calls inside, which must be as many as expected."""
    with CommDebugMode() as counted:
        yield
    assert counted.get_total_counts() == expected, counted.get_comm_counts()


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Compare nested states bit for bit, with the types of all values; sharded tensors are gathered first."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, Tensor):
        found = full(found)
        assert found.dtype == expected.dtype and torch.equal(found, expected), where
    else:
        assert found == expected and type(found) is type(expected), where


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Samples of the normal distribution in float64, the same ones for the same seed."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_of(count: int, step: int = 1) -> StepRandom:
    """The random numbers of a step for all samples of a batch."""
    return StepRandom(0, step, 0, count, count)


def constant_network(value: float, dtype: torch.dtype = torch.float32) -> Network:
    """A network whose only weight has this value."""
    module = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(module.weight, value)
    return Network(module, module, None, torch.device("cpu"))


def resident(field: str) -> int:
    """The bytes of this process's memory that a field of Linux counts."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def five_samples(inputs: Callable[[Tensor], Tensor]) -> Iterator[EvalBatch]:
    """Two batches of five samples and a padded one; a sample's input is a function of its position."""
    for first in (0, 3):
        positions = torch.tensor([first, first + 1, first + 2]).clamp(max=4)
        valid = torch.tensor([True, True, first == 0])
        noise = StepRandom(0, -1, total=5, rows=positions)
        yield EvalBatch({"x": inputs(positions.float()[:, None])}, valid, positions, noise)


def refusal_of(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """The message of the `ConfigError` that a call raises, which must be one line."""
    with pytest.raises(ConfigError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def composed(*argv: str) -> DictConfig:
    """The configuration of a command line of the trainer."""
    return compose(list(argv))[0]


def freeze(cfg: DictConfig) -> str:
    """The text of `config.yaml` of a run with this configuration."""
    return freeze_config(to_config(cfg))


def make_run_dir(path: Path | str, config_yaml: str = "{}\n", **meta: Any) -> RunDir:
    """The directory of a run that has not begun, with these fields in `meta.json`."""
    return RunDir.create(path, config_yaml=config_yaml, overrides=[], meta=meta)


def start_loggers(run_dir: Path, name: str, resumed_at: int | None = None, **choices: Any) -> Loggers:
    """The loggers of a session of a run, made from fields of `LoggerConfig`; those of tests may be targets."""
    run_dir.mkdir(exist_ok=True)
    return make_loggers(
        LoggerConfig(name=name, **choices),
        run_dir=run_dir,
        run_id="abc123",
        run_config={"ema": {"decay": 0.999}, "seed": 1},
        resumed_at=resumed_at,
        allowed=["tests."],
    )


def loop_run(
    config: TrainerConfig,
    module: nn.Module,
    task: Any,
    batches: Generator[dict[str, Tensor], None, None],
    optimizer: OptimizerConfig,
    *,
    decay: float,
) -> Run:
    """What the training loop needs, with one average that has the name of its decay."""
    return Run(
        config=config,
        network=Network(module, module, None, torch.device("cpu")),
        task=task,
        batches=batches,
        random=lambda step, micro: StepRandom(0, step, 0, 1, 1),
        reseed=lambda step: None,
        optimizer=make_optimizer(module, optimizer),
        peak_lr=optimizer.lr,
        lr_factor=lambda step: 1.0,
        bank=EMABank(module, {f"{decay:g}": EMAConfig(decay=decay)}),
        measure=TrainMetrics(config, tokens_per_sample=0, flops_per_sample=0.0),
        skipped=torch.zeros((), dtype=torch.int64),
    )


def changed_config(**values: Any) -> Config:
    """A default configuration with `group__key=value` set."""
    made = Config()
    for name, value in values.items():
        *groups, key = name.split("__")
        target: Any = made
        for group in groups:
            target = getattr(target, group)
        setattr(target, key, value)
    return made


def whole(dataset: Dataset) -> dict[str, torch.Tensor]:
    """All samples of a data set as one batch."""
    return dataset.__getitems__(range(len(dataset)))


def save_checkpoint(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    *,
    keep: int,
    session: Mapping[str, Any] | None = None,
    warn: Callable[[str], object] = lambda warning: None,
) -> Path:
    """Write a checkpoint as a run's `Saver` does without a thread, prune the old ones, and return the new one."""
    prepared = prepare(folder, step, state, session, warn)
    if prepared.is_new:
        write(prepared, prepared.tensors)
        for warning in prune(folder, prepared.path, keep) if own_rank() == 0 else ():
            warn(warning)
    return prepared.path


def batches_of(dataset: Dataset, *where: int, **reading: Any) -> Generator[dict[str, Tensor], None, None]:
    """The training batches of a split; `where` are the arguments of the sampler, `reading` those of the reading."""
    return train_batches(dataset, GlobalBatchSampler(len(dataset), *where), **reading)
