"""What a plan says, in bytes, and which tables show it. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.report.text.table import Line, Table

GIB = 2**30
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(frozen=True)
class Average:
    """One average of the run on one rank, in bytes."""

    name: str
    mode: str
    """The chosen one."""
    full_tensor: int
    """Kept whole on every rank."""
    local_shard: int
    """This rank's part."""
    on_host: bool
    """Kept in host memory (`ema.device=cpu`)."""

    @property
    def chosen(self) -> int:
        """Bytes in the mode that was chosen."""
        return self.full_tensor if self.mode == "full_tensor" else self.local_shard


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind in one phase of an optimizer step."""

    phase: str
    """`forward`, `backward` (the clipping of the gradients included) or `averages`."""
    collective: str
    """`all-gather`, `reduce-scatter`, `all-reduce`, ..."""
    calls: int
    payload: int
    """Bytes of the whole tensors: what an all-gather puts out, what a reduce-scatter or an all-reduce takes in."""
    within: float
    """Bytes that a rank sends to ranks of its node, mean over the ranks."""
    between: float
    """Bytes that a rank sends to other nodes, mean over the ranks."""


@dataclass(frozen=True)
class Held:
    """What one rank holds from step to step, in bytes."""

    rank: int
    parameters: int
    gradients: int
    optimizer: int
    averages: list[Average]

    @property
    def state(self) -> int:
        """Parameters, gradients, optimizer."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def on_device(self) -> int:
        """Averages kept on the device."""
        return sum(average.chosen for average in self.averages if not average.on_host)


@dataclass(frozen=True)
class Plan:
    """A run on `world` ranks, in bytes."""

    experiment: str
    strategy: str
    """`sharding.strategy`, or `sharding._target_` where that is set."""
    world: int
    replicas: int
    """How often the whole model is there: hsdp's outer mesh dimension, otherwise 1."""
    processes_per_node: int
    num_parameters: int
    optimizer: str
    """Its class."""
    most: Held
    """The first rank, which gets the longer parts where they are uneven."""
    least: Held
    """The last one."""
    peak: int
    """Most that is alive at once on the first rank's device in a logged step: what it holds, and what is gathered for a
    moment. Activations are not in it."""
    host: int
    """Averages in the first rank's host memory, with the copy of the live weights that they are updated from."""
    checkpoint: int
    """Files of one checkpoint, all ranks together."""
    traffic: list[Traffic]

    @property
    def moment(self) -> int:
        """What the peak has besides what is held."""
        return max(0, self.peak - self.most.state - self.most.on_device)

    @property
    def sent(self) -> tuple[float, float]:
        """Bytes a rank sends per step within its node and to other nodes."""
        return sum(one.within for one in self.traffic), sum(one.between for one in self.traffic)

    @property
    def processes(self) -> str:
        """`hsdp 2 x 32, 64 ranks on 8 nodes`."""
        nodes = -(-self.world // self.processes_per_node)
        mesh = f" {self.replicas} x {self.world // self.replicas}" if self.strategy == "hsdp" else ""
        return f"{self.strategy}{mesh}, {self.world} rank{'s'[: self.world != 1]} on {nodes} node{'s'[: nodes != 1]}"


def size(number: float) -> str:
    """`7.49 GiB`: three digits and a binary unit."""
    unit = 0
    while number >= 999.5 and unit < len(UNITS) - 1:
        number, unit = number / 1024, unit + 1
    if unit == 0:
        return f"{number:.0f} B"
    return f"{number:.{0 if number >= 99.95 else 1 if number >= 9.995 else 2}f} {UNITS[unit]}"


def tables(plan: Plan, memory_gib: float) -> list[Table]:
    """All tables of one plan: memory, averages, network."""
    found = [_memory(plan, memory_gib)]
    if plan.most.averages:
        found.append(_averages(plan))
    return [*found, _network(plan)]


def _memory(plan: Plan, memory_gib: float) -> Table:
    most, least = plan.most, plan.least
    uneven = (most.state, most.on_device) != (least.state, least.on_device)
    rows: list[tuple[str, list[int]]] = [
        ("parameters", [most.parameters, least.parameters]),
        ("gradients", [most.gradients, least.gradients]),
        (f"optimizer ({plan.optimizer})", [most.optimizer, least.optimizer]),
        ("averages", [most.on_device, least.on_device]),
        ("gathered for a moment", [plan.moment]),
        ("device memory at its peak", [plan.peak]),
    ]
    if plan.host:
        rows.append(("host memory for averages", [plan.host]))
    rows.append(("checkpoint, all ranks", [plan.checkpoint]))
    lines = []
    for name, numbers in rows:
        shown = [numbers[0], numbers[-1]] if uneven else numbers[:1]
        # Of the last rank only what it holds is known.
        cells = [size(number) for number in numbers[: len(shown)]] + [""] * (len(shown) - len(numbers))
        lines.append(Line([name, *cells], [name, *shown]))
    ranks = [f"rank {most.rank} (most)", f"rank {least.rank} (least)"] if uneven else ["every rank"]
    notes = [
        f"{plan.num_parameters:,} parameters, {plan.processes}.",
        f"Activations and what the libraries need are NOT counted: memory_gib={memory_gib:g} must hold them, too.",
        "Gathered for a moment: whole parameters and gradients of the blocks at work, buckets, temporaries of a logged"
        " step.",
    ]
    return Table(f"{plan.experiment}: memory of a rank", ["", *ranks], lines, "", notes)


def _averages(plan: Plan) -> Table:
    lines = [
        Line(
            [
                f"EMA {one.name}",
                size(one.full_tensor),
                size(one.local_shard),
                one.mode + (", host memory" if one.on_host else ""),
            ],
            [one.name, one.full_tensor, one.local_shard, one.mode],
        )
        for one in plan.most.averages
    ]
    return Table("averages: memory of a rank", ["", "full_tensor", "local_shard", "chosen"], lines)


def _network(plan: Plan) -> Table:
    lines = [
        Line(
            [
                one.phase,
                one.collective,
                str(one.calls),
                size(one.payload),
                size(one.within),
                size(one.between),
            ],
            [one.phase, one.collective, one.calls, one.payload, one.within, one.between],
        )
        for one in plan.traffic
    ]
    within, between = plan.sent
    calls = sum(one.calls for one in plan.traffic)
    cells = ["sum", "", str(calls), "", size(within), size(between)]
    lines.append(Line(cells, ["sum", "", calls, 0, within, between]))
    headers = ["phase", "collective", "calls", "whole tensors", "sent in the node", "sent to other nodes"]
    notes = [
        "Sent: by one rank, mean over all, as rings in the order of the ranks send it. Averages: in a step in which all"
        " are updated."
    ]
    return Table("network: one optimizer step", headers, lines, "", notes)


def summary(plans: Sequence[Plan]) -> Table:
    """One line per number of ranks."""
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
        lines.append(Line([str(plan.world), *map(size, numbers)], [plan.world, *numbers]))
    first = plans[0]
    count = len(first.most.averages)
    notes = [
        f"{first.num_parameters:,} parameters, {first.strategy}, {count} average{'s'[: count != 1]} together;"
        f" {first.processes_per_node} processes a node.",
        "Memory of the rank that holds most, without activations; sent: by one rank per optimizer step.",
    ]
    return Table(f"{first.experiment}: what more ranks change", headers, lines, "", notes)
