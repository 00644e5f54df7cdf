"""The training metrics of a logged step."""

import resource
import sys

import torch
from torch import Tensor

from ema import LiveCopy, divergence, drift_slope, live_copy
from trainer.config.schema import TrainerConfig
from trainer.distributed.processes import mean_over_ranks
from trainer.loop.fit import Run
from trainer.rundir.keys import SLOPE, average_key

GIB = 2**30
STEP = "live/before the step"
"""Name for the live weights before the step among the averages; names of averages have no slash."""


class TrainMetrics:
    """Loss, norms, speed, memory, distance of each average from the live weights, and size of the step.

    `train/update_rel_l2` is |theta_t - theta_(t-1)| / |theta_t| over the trainable parameters, 0 for a skipped step;
    `ema/slope` is `ema.distance.drift_slope`: 2 for drift, 1 for diffusion, 0 for stationary weights.
    """

    def __init__(self, config: TrainerConfig, *, tokens_per_sample: int, flops_per_sample: float) -> None:
        self._samples = config.global_batch_size
        self._tokens = tokens_per_sample
        self._flops = flops_per_sample
        self._before: LiveCopy | None = None

    def before(self, run: Run) -> None:
        """Copy this rank's part of the live weights before the step. No collective, no wait for the device."""
        self._before = live_copy(run.bank, run.network.module)

    def __call__(self, run: Run, loss: Tensor, grad_norm: Tensor) -> dict[str, float]:
        """Wait for the device and return the metrics of this step.

        Collectives: one all-reduce of the loss, and one for the step and the divergence of all averages.
        """
        # Reading the loss waits for the device, so the measured interval contains the whole steps.
        record = {"train/loss": mean_over_ranks(loss)} | self._speed(run)
        run.clock.restart()
        record |= {
            "train/grad_norm": float(grad_norm),
            "train/lr": run.lr(run.step),
            "train/skipped_steps": float(run.skipped),
        }
        if run.loss_scale is not None:
            record["train/loss_scale"] = float(run.loss_scale.scale)
        record |= self._distances(run)
        return record | {"mem/peak_gib": peak_memory_gib(run.network.device)}

    def _distances(self, run: Run) -> dict[str, float]:
        assert self._before is not None  # the loop calls `before` at each logged step
        distances = divergence({**run.bank, STEP: self._before}, run.network.module)
        self._before = None
        record = {"train/update_rel_l2": distances.pop(STEP).rel_l2}
        for name, one in distances.items():
            if not run.bank[name].started:
                continue
            record[average_key(name, "decay")] = one.decay
            record[average_key(name, "rel_l2")] = one.rel_l2
            record[average_key(name, "cosine")] = one.cosine
            record |= {
                average_key(name, f"block/{block}/rel_l2"): value for block, value in one.blocks.items()
            }
        slope = drift_slope(distances)
        return record if slope is None else record | {SLOPE: slope}

    def _speed(self, run: Run) -> dict[str, float]:
        step_s = run.clock.elapsed_s() / run.clock.steps
        record = {
            "time/step_s": step_s,
            "time/ema_update_s": run.clock.ema_s / run.clock.steps,
            "throughput/samples_per_s": self._samples / step_s,
        }
        if self._tokens:
            record["throughput/tokens_per_s"] = self._samples * self._tokens / step_s
        if self._flops:
            record["throughput/tflops"] = self._samples * self._flops / step_s / 1e12
        return record


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
