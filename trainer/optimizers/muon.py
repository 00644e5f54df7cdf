"""Muon for sharded matrices: torch's own, with each matrix whole while its update is made orthogonal.

The orthogonal factor of a matrix does not follow from those of its shards. torch's Muon computes with DTensors instead,
which takes several collectives for each matrix product and fails for some shapes (torch 2.13).
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

SETTINGS = [name for name in inspect.signature(torch.optim.Muon).parameters if name != "params"]
"""Names of the arguments of torch's Muon; a loaded parameter group has more keys."""


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` that accepts sharded parameters (FSDP2), with uneven and empty shards too.

    Weights and momentum stay sharded. Every rank gathers the update of one matrix after the other, in bfloat16, in
    which torch's Muon makes it orthogonal. Then each rank changes its own shard.

    Collectives of a step: one all-gather for each sharded matrix.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step; parameters without a gradient are left unchanged."""
        sharded = [
            (parameter, parameter.grad, group)
            for group in self.param_groups
            for parameter in group["params"]
            if isinstance(parameter, DTensor) and parameter.grad is not None
        ]
        for parameter, _, group in sharded:
            self._step_sharded(parameter, group)
            parameter.grad = None
        super().step()
        for parameter, grad, _ in sharded:
            parameter.grad = grad

    def _step_sharded(self, parameter: Any, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        buffer, momentum = state["momentum_buffer"], group["momentum"]
        buffer.lerp_(parameter.grad, 1 - momentum)
        update = parameter.grad.lerp(buffer, momentum) if group["nesterov"] else buffer
        settings = {key: group[key] for key in SETTINGS}
        change = _change(update.bfloat16().full_tensor(), settings)
        mesh = parameter.device_mesh
        replicated = DTensor.from_local(change, mesh, [Replicate()] * mesh.ndim, run_check=False)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(replicated.redistribute(placements=parameter.placements))


def _change(update: Tensor, settings: dict[str, Any]) -> Tensor:
    """Return what torch's Muon adds to a whole matrix, float32, without weight decay.

    Args:
        update: gradient with momentum, a whole matrix.
        settings: arguments of torch's Muon.
    """
    matrix = nn.Parameter(torch.zeros(update.shape, dtype=torch.float32, device=update.device))
    matrix.grad = update.float()
    settings = settings | {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    torch.optim.Muon([matrix], **settings).step()
    return matrix.detach()
