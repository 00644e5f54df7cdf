"""Count of the bytes that one rank allocates and sends while code runs on fake tensors, which have no memory.

A dispatch mode intercepts every operation and every collective, no matter if FSDP2, DDP, DTensor or an average calls
it. So the plan counts what the code does and needs no sharding rules of its own.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import ne
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ema.memory import local
from launch.planning.figures import Traffic

COLLECTIVES = {
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_into_tensor_out": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "broadcast_": "broadcast",
}
"""Usual name of each collective by torch's operator name; others keep torch's name and count as an all-gather."""


class Ledger(TorchDispatchMode):
    """Counter of collectives by phase and of the peak memory.

    The memory is sampled at each collective and at each fused or foreach operation. Ranks are numbered node by node.
    """

    def __init__(self, processes_per_node: int) -> None:
        super().__init__()
        self.phase: str | None = None
        """Phase under which collectives are counted; None does not count them."""
        self.peak = 0
        """Highest memory seen by `sample`, in bytes."""
        self._processes_per_node = processes_per_node
        self._alive: Any = WeakIdKeyDictionary(ref_type=weakref.ref)
        self._counts: dict[tuple[str, str], list[float]] = {}
        self._crossing: dict[str, tuple[int, float]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor then calls operations on its local shards, which are intercepted here
        if func is torch.ops.aten._local_scalar_dense.default:
            # The training loop reads whether the step is finite. Fake tensors have no values, so the answer is true.
            return True
        out = func(*args, **(kwargs or {}))
        self.note(out)
        if func in collective_ops and func not in sync_ops:
            self._count(func, out, args, kwargs or {})
            self.sample()
        elif func.name().startswith(("aten::_foreach", "aten::_fused")):
            self.sample()
        return out

    def note(self, tensors: Any) -> None:
        """Count the memory of these tensors until it is freed; meta tensors have none."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                part = local(tensor)
                if part.device.type != "meta":
                    self._alive[part.untyped_storage()] = None

    def sample(self) -> None:
        """Update the peak with the bytes that are allocated now."""
        # Sizes are read again each time, because FSDP2 resizes storages to 0 and back.
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self._alive))

    @contextmanager
    def counting(self, phase: str | None) -> Iterator[None]:
        """Count collectives within the context under `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def traffic(self) -> list[Traffic]:
        """Return the counted collectives, by phase and kind."""
        return [
            Traffic(phase, collective, int(calls), int(payload), within, between)
            for (phase, collective), (calls, payload, within, between) in self._counts.items()
        ]

    def _count(self, func: Any, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.phase is None:
            return
        operator = func.name().partition("::")[2].partition(".")[0]
        collective = COLLECTIVES.get(operator, operator)
        payload = CollectiveOp.get_comm_tensor_size(func, out, args, kwargs)
        ranks, crossing = self._ring(CollectiveOp.get_process_group(func, args))
        sent = sent_by_rank(collective, payload, ranks)
        count = self._counts.setdefault((self.phase, collective), [0, 0, 0.0, 0.0])
        for place, more in enumerate((1, payload, sent * (1 - crossing), sent * crossing)):
            count[place] += more

    def _ring(self, group: dist.ProcessGroup) -> tuple[int, float]:
        if group.group_name not in self._crossing:
            ranks = dist.get_process_group_ranks(group)
            self._crossing[group.group_name] = len(ranks), ring_crossing(ranks, self._processes_per_node)
        return self._crossing[group.group_name]


def sent_by_rank(collective: str, payload: int, ranks: int) -> float:
    """Return the bytes that each rank sends in a collective by a ring algorithm, which is the minimum.

    Each rank sends (n-1)/n of the payload to the next rank; in an all-reduce twice, first partial sums, then results
    (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009).
    `collective` is a value of `COLLECTIVES`, `payload` the bytes of the full tensors.
    """
    return (2 if collective == "all-reduce" else 1) * payload * (ranks - 1) / ranks


def ring_crossing(ranks: list[int], processes_per_node: int) -> float:
    """Return the fraction of links between different nodes, 0 to 1, in a ring over `ranks` in this order."""
    nodes = [rank // processes_per_node for rank in ranks]
    after = [*nodes[1:], *nodes[:1]]
    return sum(map(ne, nodes, after)) / len(nodes)
