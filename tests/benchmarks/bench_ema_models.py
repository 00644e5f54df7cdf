"""The models whose averages are timed, and the bounds that no average can beat."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.gpt import GPT

TENSORS_PER_BLOCK = 8
DECAY = 1 - 2**-10
"""Exact in float32, so that peers which round their decay to it still do the same work."""


class Affine(nn.Module):
    """A matrix and a vector of the same size; never called."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        rows = next(rows for rows in range(int(elements**0.5), 0, -1) if elements % rows == 0)
        self.weight = nn.Parameter(torch.empty(rows, elements // rows).normal_(std=0.02))
        self.shift = nn.Parameter(torch.empty(elements).normal_(std=0.02))


class Block(nn.Module):
    """Four of them, named as in a transformer."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        for name in ("query", "key", "value", "out"):
            self.add_module(name, Affine(elements))


class Tree(nn.Module):
    """A module tree of a given number of tensors, all of one size.

    Args:
        tensors: number of parameters.
        elements: of each of them.
    """

    def __init__(self, tensors: int, elements: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(elements) for _ in range(tensors // TENSORS_PER_BLOCK)])
        rest = tensors % TENSORS_PER_BLOCK
        self.rest = nn.ParameterList([torch.empty(elements).normal_(std=0.02) for _ in range(rest)])


def many_small() -> nn.Module:
    """1,600 tensors of 1,000 elements."""
    return Tree(1600, 1000)


def gpt_23m() -> nn.Module:
    """23 M parameters: 6 blocks of width 512."""
    return GPT(vocab_size=8192, context=512, n_layer=6, n_head=8, n_embd=512)


def gpt_124m() -> nn.Module:
    """124 M parameters: the size of GPT-2 small."""
    return GPT(vocab_size=50304, context=1024, n_layer=12, n_head=12, n_embd=768)


def count(model: nn.Module) -> int:
    """Number of elements of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def train(model: nn.Module) -> None:
    """Stands for an optimizer step: every live weight moves, none diverges however often it does."""
    parameters = list(model.parameters())
    torch._foreach_mul_(parameters, -0.75)
    torch._foreach_add_(parameters, 0.125)


def flat_lerp(elements: int, device: str = "cpu") -> Callable[[], object]:
    """One `lerp_` over contiguous float32: the memory traffic of an average, 12 bytes an element, and nothing else."""
    shadow, live = (torch.full((elements,), value, device=device) for value in (0.5, 0.25))
    return lambda: shadow.lerp_(live, 1 - DECAY)


def foreach_lerp(model: nn.Module) -> Callable[[], object]:
    """One `torch._foreach_lerp_` over lists that are there already."""
    live = [parameter.detach() for parameter in model.parameters()]
    shadow = [tensor.clone() for tensor in live]
    return lambda: torch._foreach_lerp_(shadow, live, 1 - DECAY)


def gather_then_lerp(model: nn.Module) -> Callable[[], object]:
    """All live weights into one flat scratch, then one `lerp_`."""
    live = [parameter.detach().view(-1) for parameter in model.parameters()]
    shadow = torch.cat(live)
    scratch = torch.empty_like(shadow)

    def call() -> None:
        torch.cat(live, out=scratch)
        shadow.lerp_(scratch, 1 - DECAY)

    return call


def distance(of: Sequence[Tensor], to: Sequence[Tensor]) -> float:
    """Relative L2 distance of two lists of tensors, in float64."""
    apart = size = 0.0
    for a, b in zip(of, to, strict=True):
        apart += (
            float(torch.linalg.vector_norm((a.detach().to(b.device) - b).float(), dtype=torch.float64)) ** 2
        )
        size += float(torch.linalg.vector_norm(b.float(), dtype=torch.float64)) ** 2
    return (apart / size) ** 0.5
