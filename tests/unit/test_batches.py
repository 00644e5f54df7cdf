"""Batches by global sample index and the random numbers of a step.

Expected numbers come from the definition in `trainer.data.batches`: row j of step s is sample g = s * B + j, entry
g % n of the permutation of epoch g // n; and from the moments of the normal and the uniform distribution.
"""

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain
from multiprocessing import active_children
from multiprocessing.context import ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.makers import batches_of
from trainer.data.batches import (
    GlobalBatchSampler,
    eval_batches,
    eval_indices,
    first_row,
    micro_batch_size,
)
from trainer.errors import ConfigError
from trainer.protocols import Batch
from trainer.seeding import StepRandom, micro_batch_random, mix, seed_step
from trainer.shell.terminal import STOP_SIGNALS

LAYOUTS = [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (4, 1), (4, 3)]


def own_children() -> list[BaseProcess]:
    """The processes of this process but those of the pool of ranks, which other tests may have started."""
    return [child for child in active_children() if not isinstance(child, ForkServerProcess)]


class Counting:
    """Sample i is the number i."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return {"index": torch.tensor(indices)}


def global_batches(
    world: int, accumulate: int, *, num_samples: int = 50, start_step: int = 0, steps: int = 9, seed: int = 3
) -> list[list[int]]:
    """Each step's global batch, put together from what the ranks read."""
    ranks = [
        iter(GlobalBatchSampler(num_samples, 24, accumulate, rank, world, seed, start_step, steps))
        for rank in range(world)
    ]
    batches = [
        list(chain.from_iterable(next(rank) for rank in ranks for _ in range(accumulate)))
        for _ in range(start_step, steps)
    ]
    assert all(next(rank, None) is None for rank in ranks)
    return batches


@pytest.mark.parametrize(("world", "accumulate"), LAYOUTS)
def test_any_layout_of_processes_reads_the_same_global_batches_in_order(world: int, accumulate: int) -> None:
    assert global_batches(world, accumulate) == global_batches(1, 1)


@pytest.mark.parametrize(("world", "accumulate"), LAYOUTS)
def test_first_row_tells_where_in_the_global_batch_a_micro_batch_lies(world: int, accumulate: int) -> None:
    step = global_batches(1, 1)[4]
    size = micro_batch_size(24, accumulate, world)
    for rank in range(world):
        batches = list(GlobalBatchSampler(50, 24, accumulate, rank, world, 3, 4, 5))
        for micro, batch in enumerate(batches):
            row = first_row(24, accumulate, rank, world) + micro * size
            assert batch == step[row : row + size]


@pytest.mark.parametrize("stop", [0, 1, 2, 5, 8])
def test_a_resumed_run_reads_what_the_uninterrupted_one_reads(stop: int) -> None:
    assert global_batches(2, 3, start_step=stop) == global_batches(2, 3)[stop:]


@pytest.mark.parametrize("num_samples", [5, 24, 50])
def test_every_sample_is_seen_once_an_epoch_also_when_batches_straddle_epochs(num_samples: int) -> None:
    order = list(chain.from_iterable(global_batches(1, 1, num_samples=num_samples, steps=25)))
    epochs = [order[i : i + num_samples] for i in range(0, len(order) - num_samples + 1, num_samples)]
    assert len(epochs) == 600 // num_samples
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_samples))
    assert epochs[0] != epochs[1]


def test_another_seed_is_another_order() -> None:
    assert global_batches(1, 1, seed=3) != global_batches(1, 1, seed=4)


def test_an_indivisible_global_batch_is_refused_by_name() -> None:
    with pytest.raises(ConfigError) as error:
        micro_batch_size(30, 2, 4)
    message = "trainer.global_batch_size: 30 is not divisible by 4 processes x 2 accumulation steps"
    assert str(error.value) == message


class Failing(Counting):
    """A data set that refuses sample 7, fails at sample 8, and never returns sample 9."""

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        if 7 in indices:
            raise ConfigError("data.path: 7.png cannot be read") from OSError("truncated")
        if 8 in indices:
            raise KeyError("eight")
        if 9 in indices:
            threading.Event().wait()
        return super().__getitems__(indices)


def seed_of(first: Sequence[int], second: Sequence[int] = range(10)) -> int:
    """A seed whose first two samples of ten are among these."""

    def fits(seed: int) -> bool:
        samples = list(chain(*GlobalBatchSampler(10, 1, 1, 0, 1, seed, 0, 2)))
        return samples[0] in first and samples[1] in second

    return next(filter(fits, range(1000)))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_bad_input_that_a_worker_finds_is_the_same_one_line(num_workers: int) -> None:
    batches = batches_of(Failing(10), 1, 1, 0, 1, seed_of([7]), 0, 10, num_workers=num_workers)
    with pytest.raises(ConfigError) as error:
        next(batches)
    assert str(error.value) == "data.path: 7.png cannot be read"
    if num_workers:
        assert "OSError: truncated" in "".join(error.value.__notes__)
    assert not own_children()


def test_another_error_in_a_worker_ends_all_workers() -> None:
    batches = batches_of(Failing(10), 1, 1, 0, 1, seed_of([8]), 0, 10, num_workers=2)
    with pytest.raises(ConfigError) as error:
        next(batches)
    message = str(error.value)
    assert message.startswith("data: a DataLoader worker failed: KeyError: 'eight' (test_batches.py:")
    assert "\n" not in message and 'raise KeyError("eight")' in "".join(error.value.__notes__)
    assert not own_children()


def test_closed_batches_end_workers_that_never_answer() -> None:
    batches = batches_of(Failing(10), 1, 1, 0, 1, seed_of(range(7), [9]), 0, 2, num_workers=2)
    next(batches)
    assert len(own_children()) == 2
    batches.close()
    assert not own_children()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_read_and_closed_in_a_thread_too(num_workers: int) -> None:
    def read() -> int:
        with closing(batches_of(Counting(10), 2, 1, 0, 1, 0, 0, 10, num_workers=num_workers)) as batches:
            return len(next(batches)["index"])

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(read).result(60) == 2
    assert not own_children()


class Signals(Counting):
    """A data set whose samples are the signals that do not reach the process from its first instruction on."""

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return {"blocked": torch.tensor(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))}


def test_a_worker_never_sees_the_signals_that_stop_a_run() -> None:
    """Not even before it can ignore them; the main process goes on to see them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    batches = batches_of(Signals(10), 1, 1, 0, 1, 0, 0, 10, num_workers=1)
    assert set(STOP_SIGNALS) <= set(next(batches)["blocked"].tolist())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    batches.close()


def test_an_error_of_the_main_process_ends_python_while_workers_live(tmp_path: Path) -> None:
    (tmp_path / "zeros.py").write_text("""
import torch

class Zeros:
    def __getitems__(self, indices):
        return {"zero": torch.zeros(len(indices))}
""")
    script = """
from trainer.data.batches import GlobalBatchSampler, train_batches
from zeros import Zeros
batches = train_batches(Zeros(), GlobalBatchSampler(50, 4, 1, 0, 1, 0, 0, 9), num_workers=2)
next(batches)
raise ValueError("a mistake of the user's")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: a mistake of the user's\n")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_train_batches_are_the_samples_of_the_sampler(num_workers: int) -> None:
    batches = batches_of(Counting(50), 24, 3, 1, 2, 7, 2, 6, num_workers=num_workers)
    read = [batch["index"].tolist() for batch in batches]
    assert read == list(GlobalBatchSampler(50, 24, 3, 1, 2, 7, 2, 6))
    assert len(read) == 12


def test_reading_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(batches_of(Counting(50), 24, 1, 0, 1, 7, 0, 6))
    list(eval_batches(Counting(50), 10, 4, 0, 1, 7))
    StepRandom(0, 0, 0, 4, 4).normal(2)
    assert torch.equal(torch.get_rng_state(), before)


@settings(deadline=None)
@given(
    count=st.integers(1, 40),
    wanted=st.integers(0, 50),
    size=st.integers(1, 9),
    world=st.integers(1, 7),
)
def test_evaluation_covers_each_position_once_in_equal_batches(
    count: int, wanted: int, size: int, world: int
) -> None:
    indices = eval_indices(count, wanted, seed=5)
    ranks = [list(eval_batches(Counting(count), wanted, size, rank, world, 5)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len({len(valid) for batches in ranks for _, valid, _ in batches}) == 1
    assert len(ranks[0][0][1]) <= size
    seen: list[int] = []
    for batch, valid, positions in chain.from_iterable(ranks):
        assert torch.equal(batch["index"], indices[positions])
        seen += positions[valid].tolist()
    assert seen == list(range(len(indices)))


def test_evaluation_set_is_a_fixed_part_of_the_split() -> None:
    assert len(eval_indices(1000, 256, 0)) == 256
    assert torch.equal(eval_indices(1000, 256, 0)[:100], eval_indices(1000, 100, 0))
    assert sorted(eval_indices(1000, 0, 0).tolist()) == list(range(1000))
    assert sorted(eval_indices(10, 256, 0).tolist()) == list(range(10))


class Blurred(Counting):
    """A split that draws from torch's global generator."""

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return {"noise": torch.randn(len(indices))}


def test_what_draws_from_the_global_generator_draws_the_same_numbers_in_every_evaluation() -> None:
    def drawn() -> list[tuple[list[float], list[float]]]:
        torch.rand(1)  # of a training step in between
        before = torch.get_rng_state()
        of_all = [
            (batch["noise"].tolist(), torch.randn(2).tolist())  # by the split, then by the model
            for batch, _, _ in eval_batches(Blurred(9), 0, 4, 0, 1, 0)
        ]
        assert torch.equal(torch.get_rng_state(), before)
        return of_all

    live, average = drawn(), drawn()
    assert live == average
    assert len({number for of_one in live for numbers in of_one for number in numbers}) == 9 + 3 * 2


@pytest.mark.parametrize("draw", ["normal", "uniform"])
@pytest.mark.parametrize(("world", "accumulate"), LAYOUTS)
def test_any_layout_of_processes_draws_the_same_numbers(draw: str, world: int, accumulate: int) -> None:
    def drawn(random: StepRandom) -> tuple[Tensor, Tensor]:
        return getattr(random, draw)(3, 5), getattr(random, draw)()

    whole = drawn(StepRandom(1, 17, 0, 24, 24))
    size = micro_batch_size(24, accumulate, world)
    of_ranks = [
        micro_batch_random(1, first=first, count=size, total=24, device=torch.device("cpu"))
        for first in (first_row(24, accumulate, rank, world) for rank in range(world))
    ]
    parts = [drawn(own(17, micro)) for own in of_ranks for micro in range(accumulate)]
    assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
    assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])


def test_rows_of_a_padded_batch_draw_what_their_positions_draw() -> None:
    rows = torch.tensor([22, 23, 3, 23, 23])
    whole = StepRandom(1, 17, 0, 24, 24).normal(4)
    assert torch.equal(StepRandom(1, 17, total=24, rows=rows).normal(4), whole[rows])


def test_seed_step_and_number_of_the_draw_each_change_the_numbers() -> None:
    random = StepRandom(1, 2, 0, 8, 8)
    draws = [random.uniform(), random.uniform()]
    draws += [StepRandom(seed, step, 0, 8, 8).uniform() for seed, step in [(2, 2), (1, 3), (2, 1)]]
    values = torch.cat(draws)
    assert len(values.unique()) == len(values) == 40


def test_draws_have_the_moments_of_their_distributions() -> None:
    # 2**18 numbers: the mean of a standard normal has standard error 1/512, its variance sqrt(2)/512.
    normal = StepRandom(0, 0, 0, 256, 256).normal(1024)
    assert normal.shape == (256, 1024)
    assert normal.dtype == torch.float32
    assert abs(normal.mean()) < 5 / 512
    assert abs(normal.var() - 1) < 5 * 2**0.5 / 512
    # Rows of different blocks and of the same block are independent: correlations of 1024 pairs, error 1/32.
    correlation = torch.corrcoef(normal[:32])
    assert (correlation - torch.eye(32)).abs().max() < 6 / 32
    uniform = StepRandom(0, 0, 0, 256, 256).uniform(1024)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 5 * 12**-0.5 / 512


@pytest.mark.parametrize(
    "rows", [torch.tensor([0, 24]), torch.tensor([-1]), torch.tensor([], dtype=torch.int64)]
)
def test_rows_outside_the_batch_are_refused(rows: Tensor) -> None:
    with pytest.raises(ValueError, match="batch of 24"):
        StepRandom(0, 0, total=24, rows=rows)


def test_mix_gives_unrelated_seeds_in_range() -> None:
    seeds = [mix(a, b) for a in range(-20, 80) for b in range(100)]
    assert len(set(seeds)) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    bits = Counter(bit for seed in seeds for bit in range(63) if seed >> bit & 1)
    # Each bit is a fair coin: 10,000 throws, standard deviation 50.
    assert all(abs(bits[bit] - 5000) < 6 * 50 for bit in range(63))
    assert len({mix(1), mix(1, 0), mix(0, 1), mix(1, 2), mix(2, 1)}) == 5


def test_mix_is_built_on_splitmix64() -> None:
    """First output of SplitMix64 from state 0: 0xE220A8397B1DCDAF, Vigna's reference `splitmix64.c`."""
    from trainer.seeding import _splitmix64

    assert _splitmix64(0) == 0xE220A8397B1DCDAF


def test_seed_step_makes_dropout_a_function_of_step_and_rank() -> None:
    def dropped(step: int, rank: int) -> list[float]:
        seed_step(0, step, rank)
        return torch.nn.functional.dropout(torch.ones(64)).tolist()

    assert dropped(3, 0) == dropped(3, 0)
    assert dropped(3, 0) != dropped(4, 0)
    assert dropped(3, 0) != dropped(3, 1)
