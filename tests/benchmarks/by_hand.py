"""A training step written by hand: what a researcher would write who needs nothing else."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.build import Parts
from trainer.config.schema import Config
from trainer.data.batches import GlobalBatchSampler

DECAY = 0.999
Gate = Callable[[], bool]


@dataclass
class Side:
    """A loop to be timed, and where the weights are that it trains."""

    loop: Callable[[Gate], None]
    live: Callable[[], list[Tensor]]
    averaged: Callable[[], list[Tensor]]


class Average:
    """The plainest average of some parameters: it begins with the first ones, and takes one call a step."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self.shadow = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.shadow, self._parameters, 1 - DECAY)


def adamw(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW with no weight decay on vectors."""
    args: dict[str, Any] = {**config.optimizer.args, "betas": tuple(config.optimizer.args["betas"])}
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.optimizer.lr, **args)


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy over all positions."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def sampler_of(config: Config, parts: Parts) -> GlobalBatchSampler:
    """The rows of each batch, in the order in which the trainer takes them."""
    settings = config.trainer
    size = len(parts.splits.train)
    return GlobalBatchSampler(size, settings.global_batch_size, 1, 0, 1, config.seed, 0, settings.steps)


def hand_written(config: Config, parts: Parts) -> Side:
    """What a researcher would write who needs nothing else."""
    model = copy.deepcopy(parts.network.module)
    optimizer = adamw(model, config)
    parameters: list[Tensor] = list(model.parameters())
    device = parameters[0].device
    average = Average(parameters)
    train, sampler = parts.splits.train, sampler_of(config, parts)

    def loop(gate: Gate) -> None:
        model.train()
        for rows in sampler:
            tokens = train.__getitems__(rows)["tokens"].to(device, non_blocking=True)
            loss = next_token_loss(model, tokens)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, config.trainer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            average.update()
            if gate():
                return

    return Side(loop, lambda: parameters, lambda: average.shadow)
