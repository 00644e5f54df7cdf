"""Random numbers as a pure function of the seed, the step and the sample; no generator state is saved.

Every number comes from a new generator, seeded with a hash of its use, step and sample. So a resumed run, another
number of processes and another accumulation all draw the same numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_BLOCK_ROWS = 8

DATA_ORDER, EVAL_SUBSET, SAMPLE_NOISE, GLOBAL_STATE, LOADER, AUGMENTATION = range(1, 7)
"""First argument of `mix` for each use, so that no two uses share a seed."""

EVALUATION = -1
"""Step number for the random numbers of every evaluation; negative, so that no training step uses it."""


def _splitmix64(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def mix(*numbers: int) -> int:
    """Hash a sequence of integers to one seed in [0, 2**63).

    Neighbouring inputs (step 1 and 2, seed 0 and 1) give unrelated seeds; `mix(1)` and `mix(1, 0)` differ.
    The mixing function is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014).
    """
    state = 0
    for number in numbers:
        state = _splitmix64(state ^ _splitmix64(number & _MASK))
    return state >> 1


def seed_step(seed: int, step: int, place: int) -> None:
    """Seed torch's global generators (dropout, ...) for one rank of a step, or one batch of an evaluation."""
    state = mix(GLOBAL_STATE, seed, step, place)
    # torch.manual_seed would also store the seed and a stack trace for every kind of device that is not in use.
    torch.default_generator.manual_seed(state)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(state)


class StepRandom:
    """Random numbers (`SampleRandom`) for some rows of the batch of one step.

    The numbers of the n-th call depend only on `seed`, `step`, n and the row. They are drawn on the CPU in blocks of
    eight rows, each with its own seed, so that a process draws few numbers besides those of its own rows.

    Args:
        seed: seed of the run.
        step: optimizer step, or a constant for a use outside training steps (every evaluation passes the same one).
        first: first row of a contiguous range of the global batch; ignored with `rows`.
        count: rows in that range; ignored with `rows`.
        total: rows of the whole batch; every row must be in [0, total). It does not change the numbers drawn.
        device: device of the returned tensors.
        rows: int64 `[samples]`, rows in any order and repetition, for padded evaluation batches.

    Raises:
        ValueError: A row is outside the batch, or there are no rows.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        first: int = 0,
        count: int = 0,
        total: int = 0,
        device: torch.device | str = "cpu",
        rows: Tensor | None = None,
    ) -> None:
        self._rows = torch.arange(first, first + count) if rows is None else rows.cpu()
        if not len(self._rows) or int(self._rows.min()) < 0 or int(self._rows.max()) >= total:
            raise ValueError(f"StepRandom: rows {self._rows.tolist()[:5]}... are not in a batch of {total}")
        self._seed, self._step, self._device = seed, step, device
        self._draws = 0

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers, float32 `[samples, *shape]`."""
        return self._draw(Tensor.normal_, shape)

    def uniform(self, *shape: int) -> Tensor:
        """Draw numbers uniform on [0, 1), float32 `[samples, *shape]`."""
        return self._draw(Tensor.uniform_, shape)

    def _draw(self, fill: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        blocks, block_of_row = torch.unique(self._rows // _BLOCK_ROWS, return_inverse=True)
        numbers = torch.empty(len(blocks), _BLOCK_ROWS, *shape, dtype=torch.float32)
        generator = torch.Generator()
        for block, block_numbers in zip(blocks.tolist(), numbers, strict=True):
            generator.manual_seed(mix(SAMPLE_NOISE, self._seed, self._step, self._draws, block))
            fill(block_numbers, generator=generator)
        self._draws += 1
        mine = numbers.flatten(0, 1)[block_of_row * _BLOCK_ROWS + self._rows % _BLOCK_ROWS]
        if torch.device(self._device).type == "cuda":
            mine = mine.pin_memory()  # otherwise the copy would wait for the device
        return mine.to(self._device, non_blocking=True)


def micro_batch_random(
    seed: int, *, first: int, count: int, total: int, device: torch.device
) -> Callable[[int, int], StepRandom]:
    """Return a function of the step and the micro-batch, counted from 0 in its step, that makes its random numbers.

    `first` is the row in the global batch of the rank's first sample; `count` samples are in a micro-batch of the rank,
    and `total` in the global batch.
    """
    return lambda step, micro: StepRandom(seed, step, first + micro * count, count, total, device)
