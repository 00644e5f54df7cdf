"""Numbers of a plan in bytes, and the tables that show them. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.report.format import format_size
from trainer.report.text.table import Line, Table

GIB = 2**30
"""Bytes of 1 GiB."""


@dataclass(frozen=True)
class Average:
    """Memory of one average on one rank."""

    name: str
    mode: str
    """Mode in the configuration: `full_tensor` or `local_shard`."""
    full_tensor: int
    """Bytes in mode `full_tensor`, in which every rank has the full tensors."""
    local_shard: int
    """Bytes in mode `local_shard`, in which this rank has its shards only."""
    on_host: bool
    """Whether the average is in host memory (`ema.device=cpu`)."""

    @property
    def chosen(self) -> int:
        """Bytes in the mode of the configuration."""
        return self.full_tensor if self.mode == "full_tensor" else self.local_shard


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one phase of an optimizer step."""

    phase: str
    """`forward`, `backward` (including gradient clipping) or `averages`."""
    collective: str
    """Kind of collective, such as `all-gather`, `reduce-scatter` or `all-reduce`."""
    calls: int
    """Number of calls in one step."""
    payload: int
    """Bytes of the full tensors: the output of an all-gather, the input of a reduce-scatter or all-reduce."""
    within: float
    """Bytes that a rank sends to ranks of its own node, averaged over the ranks."""
    between: float
    """Bytes that a rank sends to other nodes, averaged over the ranks."""


@dataclass(frozen=True)
class Held:
    """Memory in bytes that one rank uses permanently, from step to step."""

    rank: int
    parameters: int
    gradients: int
    optimizer: int
    averages: list[Average]

    @property
    def state(self) -> int:
        """Bytes of parameters, gradients and optimizer state."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def on_device(self) -> int:
        """Bytes of the averages in device memory."""
        return sum(average.chosen for average in self.averages if not average.on_host)


@dataclass(frozen=True)
class Plan:
    """Memory and network traffic of a run on `world` ranks; all sizes are in bytes."""

    experiment: str
    strategy: str
    """`sharding._target_` if it is set, otherwise `sharding.strategy`."""
    world: int
    """Number of ranks."""
    replicas: int
    """Number of replicas of the model across shard groups: hsdp's outer mesh dimension, otherwise 1."""
    processes_per_node: int
    num_parameters: int
    """Number of scalar parameters of the full model."""
    optimizer: str
    """Name of the optimizer's class."""
    most: Held
    """Memory of the first rank, which has the largest shards if shards differ in size."""
    least: Held
    """Memory of the last rank, which has the smallest shards."""
    peak: int
    """Highest device memory of the first rank in a logged step, including temporary buffers, without activations."""
    host: int
    """Host memory of the first rank for averages, including the copy of the live weights that updates them."""
    checkpoint: int
    """Size of one checkpoint, with the files of all ranks."""
    traffic: list[Traffic]
    """Collectives of one optimizer step in which all averages are updated."""
    building: int = 0
    """Host memory for the whole model, which every rank builds before it is sharded; 0 if it is built on meta."""
    saving: int = 0
    """Host memory of the first rank for the copy of the state that a thread writes; 0 without `trainer.async_save`."""
    snapshots: int = 0
    """Size of all snapshots of the run (`ema.snapshots`), with the files of all ranks."""
    snapshots_of_rank: int = 0
    """Bytes of all snapshots that the first rank writes."""

    @property
    def moment(self) -> int:
        """Bytes of temporary buffers at the peak: the peak minus the permanent memory."""
        return max(0, self.peak - self.most.state - self.most.on_device)

    @property
    def sent(self) -> tuple[float, float]:
        """Bytes that a rank sends per step within its node and to other nodes."""
        return sum(one.within for one in self.traffic), sum(one.between for one in self.traffic)

    @property
    def processes(self) -> str:
        """Text on strategy, ranks and nodes, such as `sharding hsdp 2 x 32, world=64 on 8 nodes`."""
        nodes = -(-self.world // self.processes_per_node)
        mesh = f" {self.replicas} x {self.world // self.replicas}" if self.strategy == "hsdp" else ""
        return f"sharding {self.strategy}{mesh}, world={self.world} on {nodes} node{'s'[: nodes != 1]}"


def tables(plan: Plan, memory_gib: float) -> list[Table]:
    """Return the tables of one plan: memory, averages if it has any, and network."""
    memory = [_memory(plan, memory_gib)]
    if plan.most.averages:
        memory.append(_averages(plan))
    return [*memory, _network(plan)]


def _memory(plan: Plan, memory_gib: float) -> Table:
    most, least = plan.most, plan.least
    uneven = (most.state, most.on_device) != (least.state, least.on_device)
    rows: list[tuple[str, list[int]]] = [
        ("parameters", [most.parameters, least.parameters]),
        ("gradients", [most.gradients, least.gradients]),
        (f"optimizer ({plan.optimizer})", [most.optimizer, least.optimizer]),
        ("averages", [most.on_device, least.on_device]),
        ("temporary buffers", [plan.moment]),
        ("device memory at its peak", [plan.peak]),
    ]
    others = {
        "host memory for averages": plan.host,
        "host memory to build the model": plan.building,
        "host memory to save beside the training": plan.saving,
        "checkpoint, all ranks": plan.checkpoint,
        "snapshots of the run, all ranks": plan.snapshots,
        "snapshots of the run, of a rank": plan.snapshots_of_rank,
    }
    rows += [(name, [number]) for name, number in others.items() if number]
    lines = []
    for name, numbers in rows:
        shown = [numbers[0], numbers[-1]] if uneven else numbers[:1]
        # Only the permanent memory is computed for the last rank.
        cells = [format_size(number) for number in numbers[: len(shown)]] + [""] * (len(shown) - len(numbers))
        lines.append(Line([name, *cells], [name, *shown]))
    ranks = [f"rank {most.rank} (most)", f"rank {least.rank} (least)"] if uneven else ["every rank"]
    notes = [
        f"{plan.num_parameters:,} parameters, {plan.processes}.",
        "Activations and the memory of the libraries are NOT counted, but must also fit into"
        f" memory_gib={memory_gib:g}.",
        "Temporary buffers: full parameters and gradients of the blocks in use, communication buckets, intermediate"
        " results of a logged step.",
    ]
    return Table(f"{plan.experiment}: memory of a rank", ["", *ranks], lines, "", notes)


def _averages(plan: Plan) -> Table:
    lines = [
        Line(
            [
                f"EMA {one.name}",
                format_size(one.full_tensor),
                format_size(one.local_shard),
                one.mode + (", host memory" if one.on_host else ""),
            ],
            [one.name, one.full_tensor, one.local_shard, one.mode],
        )
        for one in plan.most.averages
    ]
    return Table("averages: memory of a rank", ["", "full_tensor", "local_shard", "chosen"], lines)


def _network(plan: Plan) -> Table:
    lines = [
        _line([one.phase, one.collective, one.calls], [one.payload, one.within, one.between])
        for one in plan.traffic
    ]
    within, between = plan.sent
    calls = sum(one.calls for one in plan.traffic)
    cells = ["sum", "", str(calls), "", format_size(within), format_size(between)]
    lines.append(Line(cells, ["sum", "", calls, 0, within, between]))
    headers = ["phase", "collective", "calls", "whole tensors", "sent in the node", "sent to other nodes"]
    notes = [
        "Sent: by one rank, averaged over all ranks, with ring algorithms in rank order. Averages: in a step in which"
        " all averages are updated."
    ]
    return Table("network: one optimizer step", headers, lines, "", notes)


def _line(names: Sequence[str | int], sizes: Sequence[float]) -> Line:
    return Line([*map(str, names), *map(format_size, sizes)], [*names, *sizes])


def summary(plans: Sequence[Plan]) -> Table:
    """Return a table that compares plans of the same run, with one line per number of ranks."""
    headers = [
        "ranks",
        "parameters + gradients + optimizer",
        "EMA full_tensor",
        "EMA local_shard",
        "memory at its peak",
        "checkpoint",
        "sent in the node",
        "sent to other nodes",
    ]
    lines = []
    for plan in plans:
        averages = plan.most.averages
        numbers = [
            plan.most.state,
            sum(one.full_tensor for one in averages),
            sum(one.local_shard for one in averages),
            plan.peak,
            plan.checkpoint,
            *plan.sent,
        ]
        lines.append(_line([plan.world], numbers))
    first = plans[0]
    count = len(first.most.averages)
    notes = [
        f"{first.num_parameters:,} parameters, sharding {first.strategy}, {count} average{'s'[: count != 1]} together;"
        f" {first.processes_per_node} processes per node.",
        "Memory: of the rank with the highest use, without activations. Sent: by one rank per optimizer step.",
    ]
    return Table(f"{first.experiment}: comparison of numbers of ranks", headers, lines, "", notes)
