"""Rehearsal of a run: two optimizer steps of one rank, with fake tensors and a process group without network.

The functions of a real run build the model, its sharding, the optimizer and the averages, and do the steps. Only the
forward is replaced: each FSDP2 unit uses its parameters and calls the units below it. So neither data nor activations
are needed, and FSDP2 and DDP call the same collectives as in a run.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from ema import EMABank, EMAConfig
from ema.state import COUNTERS, RULE
from launch.planning.figures import Average, Held, Plan, Traffic
from launch.planning.forward import Touching, reduce_bucket, touch_parameters
from launch.planning.ledger import Ledger
from launch.planning.parts import Layout, Part, checkpoint_bytes, describe, own_bytes, own_file_bytes
from trainer.build import make_bank
from trainer.checkpoint.changes import as_changes
from trainer.checkpoint.saving import state_of
from trainer.checkpoint.series import snapshot_steps
from trainer.config.schema import Config
from trainer.config.targets import instantiate
from trainer.config.trust import resolve_target
from trainer.distributed.materialize import builds_on_meta
from trainer.distributed.processes import Processes
from trainer.distributed.sharding import Network, shard
from trainer.errors import ConfigError
from trainer.loop.fit import Clock, Run, train_step
from trainer.loop.step_metrics import TrainMetrics
from trainer.optimizers import class_name, make_optimizer

NEVER = 1 << 60
"""Number of steps that no run reaches."""


def make_plan(
    config: Config,
    averages: Mapping[str, EMAConfig],
    world: int,
    processes_per_node: int,
    allowed: Sequence[str],
) -> Plan:
    """Compute the plan of a run on `world` ranks from a rehearsal of its first rank.

    Args:
        config: Configuration that was validated for `world`.
        averages: Settings of each average by name, as returned by `validate`.
        world: Number of ranks, at least 1.
        processes_per_node: Ranks on each node, at least 1.
        allowed: Prefixes of `_target_` that are trusted, in addition to the built-in ones.

    Raises:
        ConfigError: See `trainer.build.build`; or the model's constructor computes with the values of tensors.
    """
    # Compilation and activation checkpointing change neither permanent memory nor traffic, so both are switched off.
    sharding = dataclasses.replace(config.sharding, compile=False, activation_checkpointing=False)
    config = dataclasses.replace(config, sharding=sharding)
    # DTensor's cache may refer to the meshes of an earlier rehearsal, whose process groups no longer exist.
    _clear_sharding_prop_cache()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        return Rehearsal(config, averages, world, processes_per_node, allowed).plan()
    except (ConfigError, DataDependentOutputException) as error:
        if not isinstance(error.__cause__ or error, DataDependentOutputException):
            raise
        raise ConfigError(
            "model: cannot be planned, because its constructor computes with the values of tensors"
        ) from error
    finally:
        dist.destroy_process_group()


@dataclasses.dataclass(eq=False)
class Rehearsal:
    """First rank of a run, in a simulated process group of `world` ranks.

    Its arguments are those of `make_plan`.
    """

    config: Config
    configs: Mapping[str, EMAConfig]
    world: int
    processes_per_node: int
    allowed: Sequence[str]

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.processes_per_node)
        # `to_empty` gets meta tensors, which are not fake.
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.network = self._network()
        module = self.network.module
        with self.watched():
            self.optimizer = make_optimizer(module, self.config.optimizer, self.allowed)
            made = make_bank(self.config, self.configs, module, self.allowed)
            self.rules = {name: one.rule for name, one in made.items()}
            # Averages in host memory are updated by a thread, in which fake tensors do not work.
            self.bank = self._bank({n: one for n, one in self.configs.items() if one.device is None})

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Use fake tensors within the context, and count their memory and collectives in the ledger."""
        with warnings.catch_warnings(), self.fake, self.ledger:
            # Averages check if their tensors are adjacent in memory. Fake tensors have no address, so none are.
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield

    def plan(self) -> Plan:
        """Do two steps and return the plan.

        The first step allocates the state of the optimizer and of the averages; the second is measured for the peak.
        """
        parameters = list(self.network.module.parameters())
        touch_parameters(self.network.module)
        with self.watched():
            self.ledger.note([*parameters, *self.network.module.buffers()])
        run = self._run()
        layout = Layout()
        traffic, peak = self._two_steps(run, layout, parameters)
        layout.parameters = describe(parameters)
        layout.optimizer = describe(tree_leaves(list(self.optimizer.state.values())))
        with self.watched():
            layout.averages = {name: self._parts(name) for name in self.configs}
            if len(self.bank) < len(self.configs):
                run.bank = self._bank(self.configs)
            state = state_of(run)
        most, snapshots = self._held(layout, first=True), self._snapshots(state)
        on_host = sum(average.chosen for average in most.averages if average.on_host)
        return Plan(
            experiment=self.config.experiment,
            strategy=self.config.sharding._target_ or self.config.sharding.strategy,
            world=self.world,
            replicas=self.config.sharding.replicate,
            processes_per_node=self.processes_per_node,
            num_parameters=sum(parameter.numel() for parameter in parameters),
            optimizer=class_name(self.optimizer),
            most=most,
            least=self._held(layout, first=False),
            peak=peak,
            # Averages in host memory are updated from a copy of the live weights, which also needs host memory.
            host=on_host + most.parameters if on_host else 0,
            building=sum(parameter.nbytes for parameter in parameters) if self.network.built_whole else 0,
            checkpoint=checkpoint_bytes(state),
            saving=own_bytes(state) if self.config.trainer.async_save else 0,
            traffic=traffic,
            snapshots=sum(map(checkpoint_bytes, snapshots)),
            snapshots_of_rank=sum(map(own_file_bytes, snapshots)),
        )

    def _two_steps(
        self, run: Run, layout: Layout, parameters: Sequence[nn.Parameter]
    ) -> tuple[list[Traffic], int]:
        """Do two steps and note the gradients of the first; return its traffic and the peak memory of the second."""
        step = 1 + max((one.start_iter for one in self.configs.values()), default=0)
        hook = self.optimizer.register_step_pre_hook(
            lambda *_: layout.gradients.extend(describe(p.grad for p in parameters if p.grad is not None))
        )
        self._step(run, step)
        hook.remove()
        traffic = self.ledger.traffic()
        self.ledger.peak = 0
        self._step(run, step + 1)
        return traffic, self.ledger.peak

    def _snapshots(self, state: Mapping[str, Any]) -> list[Any]:
        """Return what each snapshot of the run stores (`ema.snapshots`): the first weights, then the averages."""
        ema = self.config.ema
        steps = snapshot_steps(self.config.trainer.steps, ema.snapshots, ema.snapshot_spacing)
        if not steps or not self.configs:
            return []
        later = as_changes(state["ema"]) if ema.snapshot_dtype == "bfloat16" else state["ema"]
        return [state["model"], state["ema"], *repeat(later, len(steps) - 1)]

    def _step(self, run: Run, step: int) -> None:
        run.measure = TrainMetrics(self.config.trainer, tokens_per_sample=0, flops_per_sample=0.0)
        if self.config.sharding.strategy == "ddp":
            self.network.forward = self._ddp()
        with self.watched():
            train_step(run, step)

    def _ddp(self) -> DistributedDataParallel:
        """Return the model in a new DDP wrapper; each step needs one, because DDP reorders its buckets."""
        with warnings.catch_warnings(), self.fake:
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            # `init_sync` would compare the values of tensors, which do not exist here.
            forward = DistributedDataParallel(self.network.module, broadcast_buffers=False, init_sync=False)
        forward.register_comm_hook(None, reduce_bucket)
        return forward

    def _network(self) -> Network:
        target = resolve_target(self.config.model, group="model", allowed=self.allowed)
        on_meta = builds_on_meta(target)
        processes = Processes(0, self.world, torch.device("cpu"))
        sharding = self.config.sharding
        if sharding.strategy == "ddp":
            sharding = dataclasses.replace(sharding, strategy="none")  # `_ddp` wraps the model instead
        network = shard(
            lambda: self._model(on_meta), sharding, processes, on_meta=on_meta, seed=0, allowed=self.allowed
        )
        if network.data_part is not None:
            raise ConfigError(
                "sharding._target_: cannot be planned, because ranks with the same samples exchange activations,"
                " which a plan does not count"
            )
        return network

    def _model(self, on_meta: bool) -> nn.Module:
        """Return the model with fake tensors or, if built on the meta device, with a `to_empty` that makes them fake.

        Fake tensors are used only for the model's own tensors, because the creation of a device mesh needs values. A
        model whose constructor loads weights is built on the meta device too: a run holds it whole, a plan does not.
        """
        with warnings.catch_warnings(), torch.device("meta") if on_meta else self._faked():
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
            module: nn.Module = instantiate(self.config.model, group="model", allowed=self.allowed)
        to_empty = module.to_empty
        loads_weights = on_meta and torch.get_default_device().type != "meta"
        if loads_weights:
            with self.fake:
                to_empty(device=torch.device("cpu"))

        def to_fake(*, device: torch.device) -> nn.Module:
            with self.fake:
                return to_empty(device=device)

        own: dict[str, Any] = {"to": lambda device: module}  # the model is on its device already
        if on_meta and not loads_weights:
            own = {"to_empty": to_fake, "init_weights": lambda: None}
        for name, method in own.items():
            setattr(module, name, method)
        return module

    @contextmanager
    def _faked(self) -> Iterator[None]:
        """Use fake tensors within the context, also in constructors that convert modules, such as those of peft."""
        with self.fake, patch.object(nn.Module, "_apply", _convert):
            yield

    def _run(self) -> Run:
        settings = dataclasses.replace(self.config.trainer, steps=NEVER, log_every=1)
        never: Any = None
        with self.watched():
            skipped = torch.zeros((), dtype=torch.int64)
        return Run(
            config=settings,
            network=self.network,
            task=Touching(self.ledger),
            batches=({} for _ in repeat(None)),
            random=lambda step, micro: never,
            reseed=lambda step: None,
            optimizer=self.optimizer,
            peak_lr=self.config.optimizer.lr,
            lr_factor=lambda step: 1.0,
            bank=self.bank,
            measure=never,
            skipped=skipped,
            clock=_PhaseClock(self.ledger),
        )

    def _bank(self, configs: Mapping[str, EMAConfig]) -> EMABank:
        rules = {name: rule for name in configs if (rule := self.rules[name]) is not None}
        return EMABank(self.network.module, configs, rules=rules)

    def _parts(self, name: str) -> list[Part]:
        """Return the sizes of an average's tensors in mode `local_shard`, whatever its own mode is."""
        config = self.configs[name]
        if name in self.bank and config.mode == "local_shard":
            average = self.bank[name]
        else:
            average = self._bank({name: dataclasses.replace(config, mode="local_shard")})[name]
        state = average.state_dict()
        # A tied tensor has several names in the state and must count once.
        kept = {id(tensor): tensor for key, tensor in state.items() if key not in (COUNTERS, RULE)}
        return describe(kept.values())

    def _held(self, layout: Layout, *, first: bool) -> Held:
        def local_bytes(parts: list[Part]) -> int:
            return sum(part.most if first else part.least for part in parts)

        return Held(
            rank=0 if first else self.world - 1,
            parameters=local_bytes(layout.parameters),
            gradients=local_bytes(layout.gradients),
            optimizer=local_bytes(layout.optimizer),
            averages=[
                Average(
                    name=name,
                    mode=one.mode,
                    full_tensor=sum(part.whole for part in layout.averages[name]),
                    local_shard=local_bytes(layout.averages[name]),
                    on_host=one.device is not None,
                )
                for name, one in self.configs.items()
            ],
        )


class _PhaseClock(Clock):
    """Clock of the training loop that also counts the collectives of an update of the averages."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    @contextmanager
    def ema_update(self) -> Iterator[None]:
        with self._ledger.counting("averages"):
            yield


@torch.no_grad()
def _convert(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Do what `Module._apply` does; torch's own cannot replace the content of a fake parameter."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one
    for part in module.modules() if recurse else (module,):
        for key, parameter in part._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:
                value = function(parameter)
                is_same = value is parameter
                made[parameter] = parameter if is_same else nn.Parameter(value, parameter.requires_grad)
            part._parameters[key] = made[parameter]
        for key, buffer in part._buffers.items():
            part._buffers[key] = None if buffer is None else function(buffer)
    return module
