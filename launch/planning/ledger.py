"""What one rank allocates and sends while code runs on tensors without memory.

A dispatch mode sees every operation and every collective of the process group, whoever calls it: FSDP2, DDP, DTensor,
an average. So the plan counts what the code does and states no sharding rule of its own.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

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
"""Operator of torch and the word for it; any other is called as torch calls it, and counted as an all-gather is."""


class Ledger(TorchDispatchMode):
    """Counts collectives by phase, and the bytes alive at each of them and at each operation on many tensors.

    Args:
        processes_per_node: ranks that share a node; they are numbered node by node.
    """

    def __init__(self, processes_per_node: int) -> None:
        super().__init__()
        self.phase: str | None = None
        """Collectives are counted under this name; None does not count them."""
        self.peak = 0
        self._processes_per_node = processes_per_node
        self._alive: Any = WeakIdKeyDictionary(ref_type=weakref.ref)
        self._counts: dict[tuple[str, str], list[float]] = {}
        self._crossing: dict[str, tuple[int, float]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does with its shards and with the network comes here again
        if func is torch.ops.aten._local_scalar_dense.default:
            # The host reads whether the step is finite; here it is.
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
        """Follow the storages of these tensors until they are freed."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                if part.device.type != "meta":
                    self._alive[part.untyped_storage()] = None

    def sample(self) -> None:
        """Take the bytes alive now into account for the peak."""
        # Asked anew each time: FSDP2 empties a storage and fills it again.
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self._alive))

    @contextmanager
    def counting(self, phase: str | None) -> Iterator[None]:
        """Context of one phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def traffic(self) -> list[Traffic]:
        """All that was counted."""
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
    """Bytes that each of `ranks` sends for `payload` bytes by the ring algorithms, the least that is possible.

    A ring passes (n-1)/n of the whole on to the next rank, an all-reduce twice: first the sums, then the results
    (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009).
    """
    return (2 if collective == "all-reduce" else 1) * payload * (ranks - 1) / ranks


def ring_crossing(ranks: list[int], processes_per_node: int) -> float:
    """Share of the links of a ring over `ranks`, in this order, that lead to another node."""
    nodes = [rank // processes_per_node for rank in ranks]
    return sum(node != after for node, after in zip(nodes, [*nodes[1:], *nodes[:1]], strict=True)) / len(
        nodes
    )
