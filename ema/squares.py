"""Compute sums of squares by block: of live weights, of other weights with the same names, and of their difference.

Small tensors are copied into the rows of one matrix, and each row belongs to one block. Large tensors are read in
slices. So memory is bounded, and many small tensors need few calls. All arithmetic is in float64. A plan divides the
tensors into pieces. It is used again in the next call, with its scratch memory. The tensors themselves are read from
the walk in each call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ema.layout import ranges
from ema.memory import is_dtensor, local
from ema.walk import Walk

PIECE = {"cpu": 1 << 17}
"""Elements of a piece, by kind of device: live and other tensors, in float64, together fit into a core's cache."""
PIECE_ELSEWHERE = 1 << 20
"""Elements of a piece on other kinds of devices."""
ROW = 128
"""Elements of a row, all from one block. The number of elements of a piece is a multiple of it."""

BlockOf = Callable[[str], str]
Parts = Callable[[list[str]], list[Tensor]]
Names = tuple[str, ...]
Kind = tuple[torch.device, torch.dtype, torch.Size]


@dataclass(frozen=True)
class Piece:
    """Live tensors whose squares are summed together: many small tensors, or one large tensor."""

    names: list[str]
    places: list[int]
    """Indices of the tensors in the plan's list of names."""
    shapes: list[torch.Size]
    scratch: Tensor
    """float64 or complex128 [2, elements]: memory for the live tensors and for the other tensors."""
    views: tuple[list[Tensor], list[Tensor]]
    """Views of both parts of the scratch, one per small tensor; empty for a large tensor."""
    blocks: Tensor
    """int64 [rows]: index of the block of each row."""
    weights: Tensor
    """float64 [rows, 1]: 1 / number of ranks that have the same elements, so that a sum over ranks counts them once."""

    def sums(self, lives: list[Tensor], others: Sequence[Parts]) -> Tensor:
        """Compute the sums of `block_sums` for each row; return float64 [rows, 1 + 2 * len(others)]."""
        tensors = [self._checked(parts(self.names)) for parts in others]
        if not self.views[0]:
            return _large_sums(lives[0], [other for (other,) in tensors], self.scratch)
        live, other = (part.view(-1, ROW) for part in self.scratch[:, : ROW * len(self.blocks)])
        live.zero_(), other.zero_()
        torch._foreach_copy_(self.views[0], lives)
        norms = [torch.linalg.vector_norm(live, dim=1)]
        for some in tensors:
            torch._foreach_copy_(self.views[1], some)
            norms += _pair_norms(live, other)
        return torch.stack(norms, dim=1).square_()

    def _checked(self, tensors: list[Tensor]) -> list[Tensor]:
        # Copying a tensor of a wrong shape could broadcast it without an error.
        for name, tensor, shape in zip(self.names, tensors, self.shapes, strict=True):
            if tensor.shape != shape:
                raise ValueError(f"{name!r}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
        return tensors


def _large_sums(live: Tensor, others: list[Tensor], scratch: Tensor) -> Tensor:
    size = scratch.shape[1]
    total = torch.zeros(1, 1 + 2 * len(others), dtype=torch.float64, device=live.device)
    slices = [tensor.detach().reshape(-1).split(size) for tensor in (live, *others)]
    for piece, *others_pieces in zip(*slices, strict=True):
        own, other = scratch[:, None, : piece.numel()]
        own.copy_(piece[None])
        norms = [torch.linalg.vector_norm(own, dim=1)]
        for other_piece in others_pieces:
            other.copy_(other_piece[None])
            norms += _pair_norms(own, other)
        total += torch.stack(norms, dim=1).square_()
    return total


def _pair_norms(live: Tensor, other: Tensor) -> list[Tensor]:
    """Return the norms of the rows of `other - live` and of `other`; `other` is overwritten."""
    whole = torch.linalg.vector_norm(other, dim=1)
    return [torch.linalg.vector_norm(other.sub_(live), dim=1), whole]


@dataclass(frozen=True)
class Plan:
    """Division of the live tensors of some names into pieces."""

    version: int
    kinds: list[Kind]
    block_of: BlockOf
    home: torch.device
    """Device of the sums; the process group can reduce on it."""
    blocks: list[str]
    pieces: list[Piece] = field(default_factory=list)


_plans: WeakKeyDictionary[Walk, dict[Names, Plan]] = WeakKeyDictionary()
"""The latest plan for each tuple of names; a plan refers to no tensor of the model."""


def block_sums(
    walk: Walk, names: Names, others: Sequence[Parts], block_of: BlockOf
) -> tuple[list[str], Tensor]:
    """Compute the sums of squares over this rank's part of each block.

    Args:
        walk: refreshed walk over the live tensors.
        names: names of the live tensors to use.
        others: functions that return this rank's parts of the other tensors with given names, on any device.
        block_of: function that returns the block of a name.

    Returns:
        The names of the blocks, and float64 [blocks, 1 + 2 * len(others)]: the sum of live^2, and for each function in
        `others` the sums of (other - live)^2 and of other^2. In the sum over all ranks each element counts once.

    Raises:
        ValueError: Another tensor does not have the shape of the live tensor of its name.
    """
    lives = [local(walk.by_name[name].tensor) for name in names]
    plan = _plan(walk, names, lives, block_of)
    table = torch.zeros(len(plan.blocks), 1 + 2 * len(others), dtype=torch.float64, device=plan.home)
    for piece in plan.pieces:
        sums = piece.sums([lives[place] for place in piece.places], others)
        table.index_add_(0, piece.blocks, sums.to(plan.home) * piece.weights)
    return plan.blocks, table


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _piece(device: torch.device) -> int:
    return PIECE.get(device.type, PIECE_ELSEWHERE)


def _plan(walk: Walk, names: Names, lives: list[Tensor], block_of: BlockOf) -> Plan:
    plans = _plans.setdefault(walk, {})
    # `param.data = other` can change any of these while the Parameter is still the same object.
    kinds = [(live.device, live.dtype, live.shape) for live in lives]
    plan = plans.get(names)
    if plan is None or (plan.version, plan.block_of) != (walk.version, block_of) or plan.kinds != kinds:
        with torch.inference_mode(False):  # its buffers are written later, also outside inference mode
            plan = plans[names] = _make_plan(walk, names, kinds, block_of)
    return plan


def _make_plan(walk: Walk, names: Names, kinds: list[Kind], block_of: BlockOf) -> Plan:
    tensors = [walk.by_name[name].tensor for name in names]
    meshes = [tensor.device_mesh for tensor in tensors if is_dtensor(tensor)]  # type: ignore[attr-defined]
    # The process group cannot reduce on the device of offloaded shards.
    homes = [torch.device(mesh.device_type) for mesh in meshes] + [device for device, _, _ in kinds]
    blocks: dict[str, int] = {}
    # All elements of a row must have the same block and the same number of replicas.
    owners = [
        (blocks.setdefault(block_of(name), len(blocks)), _replicas(tensor))
        for name, tensor in zip(names, tensors, strict=True)
    ]
    plan = Plan(walk.version, kinds, block_of, homes[0] if homes else torch.device("cpu"), list(blocks))
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place in sorted(range(len(names)), key=owners.__getitem__):
        device, dtype, shape = kinds[place]
        if shape.numel():
            alike.setdefault((device, _wide(dtype)), []).append(place)
    for (device, dtype), places in alike.items():
        scratch = torch.empty(2, _piece(device), dtype=dtype, device=device)
        # The first tensor of a block begins a new row. Rounding every size up reserves enough memory for that.
        sizes = (-(-kinds[place][-1].numel() // ROW) * ROW for place in places)
        for pack in ranges(sizes, scratch.shape[1]):
            plan.pieces.append(_make_piece(plan, names, owners, places[pack], scratch))
    return plan


def _make_piece(
    plan: Plan, names: Names, owners: list[tuple[int, float]], places: list[int], scratch: Tensor
) -> Piece:
    shapes = [plan.kinds[place][-1] for place in places]
    rows: list[tuple[int, float]] = []
    views: tuple[list[Tensor], list[Tensor]] = ([], [])
    if shapes[0].numel() > scratch.shape[1]:
        rows.append(owners[places[0]])
    else:
        start = 0
        for place, shape in zip(places, shapes, strict=True):
            if rows and rows[-1] != owners[place]:
                start = len(rows) * ROW
            end = start + shape.numel()
            for part, some in zip(scratch, views, strict=True):
                some.append(part[start:end].view(shape))
            rows += [owners[place]] * (-(-end // ROW) - len(rows))
            start = end
    return Piece(
        [names[place] for place in places],
        places,
        shapes,
        scratch,
        views,
        torch.tensor([block for block, _ in rows], device=plan.home),
        torch.tensor([[1 / replicas] for _, replicas in rows], dtype=torch.float64, device=plan.home),
    )


def _replicas(tensor: Tensor) -> float:
    """Return the number of ranks that hold each element."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    shards = 1
    if is_dtensor(tensor):
        mesh = tensor.device_mesh  # type: ignore[attr-defined]
        for dim, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
            if not placement.is_replicate():
                shards *= mesh.size(dim)
    return dist.get_world_size() / shards
