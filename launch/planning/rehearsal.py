"""One rank's first steps on tensors without memory, in a process group that sends nothing.

Model, sharding, optimizer and averages are made by the functions that make a run's, and the step is the loop's own.
Only the forward is replaced: each unit of sharding touches its parameters and calls the next, so neither data nor
activations are needed, and FSDP2 and DDP gather and reduce as they do in a run.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from ema import EMABank, EMAConfig
from ema.state import COUNTERS, RULE
from launch.planning.figures import Average, Held, Plan
from launch.planning.forward import Touching, reduce_bucket, touch_parameters
from launch.planning.ledger import Ledger
from launch.planning.parts import Layout, Part, checkpoint_bytes, describe
from trainer.build import make_bank
from trainer.checkpoint.resume import state_of
from trainer.config.schema import Config
from trainer.config.targets import instantiate, resolve_target
from trainer.distributed.materialize import builds_on_meta
from trainer.distributed.processes import Processes
from trainer.distributed.sharding import Network, shard
from trainer.errors import ConfigError
from trainer.loop import Clock, Run, train_step
from trainer.optim import make_optimizer
from trainer.step_metrics import TrainMetrics

NEVER = 1 << 60
"""A step that no run reaches."""


def make_plan(
    config: Config,
    averages: Mapping[str, EMAConfig],
    world: int,
    processes_per_node: int,
    allowed: Sequence[str],
) -> Plan:
    """Plan a run on `world` ranks by rehearsing its first one.

    Args:
        config: validated for `world`.
        averages: settings of each average by name, as `validate` returns them.
        world: number of ranks.
        processes_per_node: ranks that share a node.
        allowed: further prefixes that a `_target_` may start with.

    Raises:
        ConfigError: as `trainer.build.build`, or for a model whose constructor computes with values of tensors.
    """
    # Neither compiling nor recomputing changes what is held or sent, and a rehearsal has no use for them.
    sharding = dataclasses.replace(config.sharding, compile=False, activation_checkpointing=False)
    config = dataclasses.replace(config, sharding=sharding)
    # DTensor remembers the meshes of an earlier rehearsal, whose groups are gone.
    _clear_sharding_prop_cache()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        return Rehearsal(config, averages, world, processes_per_node, allowed).plan()
    except (ConfigError, DataDependentOutputException) as error:
        if not isinstance(error.__cause__ or error, DataDependentOutputException):
            raise
        raise ConfigError(
            "model: cannot be planned: its constructor computes with the values of tensors"
        ) from error
    finally:
        dist.destroy_process_group()


class Rehearsal:
    """The first rank of a run, in a process group of `world` that is pretended."""

    def __init__(
        self,
        config: Config,
        averages: Mapping[str, EMAConfig],
        world: int,
        processes_per_node: int,
        allowed: Sequence[str],
    ) -> None:
        self.config = config
        self.configs = averages
        self.world = world
        self.processes_per_node = processes_per_node
        self.allowed = allowed
        self.ledger = Ledger(processes_per_node)
        self.fake = FakeTensorMode(
            allow_non_fake_inputs=True
        )  # the meta tensors that get their memory from it
        self.network = self._network()
        with self.watched():
            self.optimizer = make_optimizer(self.network.module, config.optimizer, allowed)
            self.rules = {
                name: one.rule
                for name, one in make_bank(config, averages, self.network.module, allowed).items()
            }
            # Averages on the host are updated by a thread, where tensors without memory do not go.
            self.bank = self._bank({n: one for n, one in self.configs.items() if one.device is None})

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Context in which tensors have no memory and the ledger sees what happens to them."""
        with warnings.catch_warnings(), self.fake, self.ledger:
            # Averages look whether their tensors lie side by side; without memory none do.
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield

    def plan(self) -> Plan:
        """Take two steps and say what they took; the first makes what the optimizer and the averages keep."""
        parameters = list(self.network.module.parameters())
        touch_parameters(self.network.module)
        with self.watched():
            self.ledger.note([*parameters, *self.network.module.buffers()])
        run = self._run()
        step = 1 + max((one.start_iter for one in self.configs.values()), default=0)
        layout = Layout()
        hook = self.optimizer.register_step_pre_hook(
            lambda *_: layout.gradients.extend(describe(p.grad for p in parameters if p.grad is not None))
        )
        self._step(run, step)
        hook.remove()
        traffic = self.ledger.traffic()
        self.ledger.peak = 0
        self._step(run, step + 1)
        peak = self.ledger.peak
        layout.parameters = describe(parameters)
        layout.optimizer = describe(tree_leaves(list(self.optimizer.state.values())))
        with self.watched():
            layout.averages = {name: self._parts(name) for name in self.configs}
            if len(self.bank) < len(self.configs):
                run.bank = self._bank(self.configs)
            state = state_of(run)
        most = self._held(layout, first=True)
        return Plan(
            experiment=self.config.experiment,
            strategy=self.config.sharding._target_ or self.config.sharding.strategy,
            world=self.world,
            replicas=self.config.sharding.replicate,
            processes_per_node=self.processes_per_node,
            num_parameters=sum(parameter.numel() for parameter in parameters),
            optimizer=type(self.optimizer).__name__,
            most=most,
            least=self._held(layout, first=False),
            peak=peak,
            host=_host_bytes(most),
            checkpoint=checkpoint_bytes(state),
            traffic=traffic,
        )

    def _step(self, run: Run, step: int) -> None:
        run.measure = TrainMetrics(self.config.trainer, tokens_per_sample=0, flops_per_sample=0.0)
        if self.config.sharding.strategy == "ddp":
            self.network.forward = self._ddp()
        with self.watched():
            train_step(run, step)

    def _ddp(self) -> DistributedDataParallel:
        """Wrap the model as `sharding.shard` does, anew for each step, since DDP reorders its buckets."""
        with warnings.catch_warnings(), self.fake:
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            # What `init_sync` compares and sends are values, too.
            forward = DistributedDataParallel(self.network.module, broadcast_buffers=False, init_sync=False)
        forward.register_comm_hook(None, reduce_bucket)
        return forward

    def _network(self) -> Network:
        target = resolve_target(self.config.model, group="model", allowed=self.allowed)
        on_meta = builds_on_meta(target)
        processes = Processes(0, self.world, torch.device("cpu"))
        sharding = self.config.sharding
        if sharding.strategy == "ddp":
            sharding = dataclasses.replace(sharding, strategy="none")  # see `_ddp`
        network = shard(
            lambda: self._model(on_meta), sharding, processes, on_meta=on_meta, seed=0, allowed=self.allowed
        )
        if network.data_part is not None:
            raise ConfigError(
                "sharding._target_: cannot be planned: ranks that see the same samples exchange activations,"
                " which a plan does not count"
            )
        return network

    def _model(self, on_meta: bool) -> nn.Module:
        """The model, of tensors without memory now, or as soon as it is given its memory.

        Only its own tensors are such ones: a mesh is laid out with values.
        """
        with nullcontext() if on_meta else self.fake:
            module: nn.Module = instantiate(self.config.model, group="model", allowed=self.allowed)
        to_empty = module.to_empty

        def to_nothing(*, device: torch.device) -> nn.Module:
            with self.fake:
                return to_empty(device=device)

        own: dict[str, Any] = {"to": lambda device: module}  # it is there
        if on_meta:
            own = {"to_empty": to_nothing, "init_weights": lambda: None}
        for name, method in own.items():
            setattr(module, name, method)
        return module

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
            lr=lambda step: self.config.optimizer.lr,
            bank=self.bank,
            measure=never,
            skipped=skipped,
            clock=_PhaseClock(self.ledger),
        )

    def _bank(self, configs: Mapping[str, EMAConfig]) -> EMABank:
        rules = {name: rule for name in configs if (rule := self.rules[name]) is not None}
        return EMABank(self.network.module, configs, rules=rules)

    def _parts(self, name: str) -> list[Part]:
        """What an average keeps, or would keep in `local_shard`."""
        config = self.configs[name]
        if name in self.bank and config.mode == "local_shard":
            average = self.bank[name]
        else:
            average = self._bank({name: dataclasses.replace(config, mode="local_shard")})[name]
        state = average.state_dict()
        # Tied ones are there under several names.
        kept = {id(tensor): tensor for key, tensor in state.items() if key not in (COUNTERS, RULE)}
        return describe(kept.values())

    def _held(self, layout: Layout, *, first: bool) -> Held:
        def here(parts: list[Part]) -> int:
            return sum(part.most if first else part.least for part in parts)

        return Held(
            rank=0 if first else self.world - 1,
            parameters=here(layout.parameters),
            gradients=here(layout.gradients),
            optimizer=here(layout.optimizer),
            averages=[
                Average(
                    name=name,
                    mode=one.mode,
                    full_tensor=sum(part.whole for part in layout.averages[name]),
                    local_shard=here(layout.averages[name]),
                    on_host=one.device is not None,
                )
                for name, one in self.configs.items()
            ],
        )


def _host_bytes(held: Held) -> int:
    averages = sum(average.chosen for average in held.averages if average.on_host)
    # They are updated from a copy of the live weights, which is there, too.
    return averages + held.parameters if averages else 0


class _PhaseClock(Clock):
    """The loop's clock, which also says when the averages are updated."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    @contextmanager
    def ema_update(self) -> Iterator[None]:
        with self._ledger.counting("averages"):
            yield
