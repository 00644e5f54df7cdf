"""How close averages that are made after the run come to those that the run kept, on its real weights."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ema.posthoc import Snapshot, saved_snapshot, solve
from ema.state import COUNTERS, RULE
from tests.findings.runs import Runs, spread
from trainer.checkpoint.store import TensorReader, stored_tensors
from trainer.rundir.checkpoints import committed, step_of

BASIS = ("a", "b")
AVERAGES = (
    "ema.averages={a: {type: power, sigma_rel: 0.05}, b: {type: power, sigma_rel: 0.1},"
    " power_0.075: {type: power, sigma_rel: 0.075}, constant_0.995: {type: constant, decay: 0.995}}"
)
TARGETS = ("power_0.075", "constant_0.995")
COUNTS = (32, 16)


def synthesis(runs: Runs, seeds: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Make tracked averages from snapshots of two others, by tail sums and by plain L2; compare the weights.

    The error is ‖made - tracked‖ / ‖tracked - live‖.
    """
    errors: dict[tuple[int, str, str], list[float]] = {}
    for seed in seeds:
        run = runs.train(
            f"synthesis-{seed}",
            "experiment=small_gpt",
            AVERAGES,
            f"ema.snapshots={max(COUNTS)}",
            f"seed={seed}",
        )
        initial, *series = committed(run / "snapshots")
        assert step_of(initial) == 0 and len(series) == max(COUNTS)
        newest = committed(run / "checkpoints")[-1]
        live = weights(newest, "model/")
        for count in COUNTS:
            kept = series[:: -(max(COUNTS) // count)]
            parts = [parts_of(path, name) for path in kept for name in BASIS]
            parts += [(Snapshot(0), weights(initial, "model/")), (Snapshot(step_of(newest)), live)]
            for target in TARGETS:
                snapshot, tracked = parts_of(newest, target)
                for norm in ("tail", "l2"):
                    coefficients = solve([one for one, _ in parts], snapshot, norm).coefficients
                    made = {
                        name: sum(
                            x * own[name].double() for x, (_, own) in zip(coefficients, parts, strict=True)
                        )
                        for name in tracked
                    }
                    error = distance(made, tracked) / distance(tracked, live)
                    errors.setdefault((count, target, norm), []).append(error)
    for count in sorted(COUNTS):
        for target in TARGETS:
            tail, plain = errors[count, target, "tail"], errors[count, target, "l2"]
            yield (
                f"{count} snapshots, {target}",
                f"tail sums {spread([1e4 * e for e in tail], 2)}e-4, plain L2 {spread([1e4 * e for e in plain], 2)}e-4",
            )


def parts_of(path: Path, name: str) -> tuple[Snapshot, dict[str, Tensor]]:
    """Return the rule and the weights of an average in a folder of a run."""
    reader, prefix = TensorReader(path), f"ema/{name}/"
    own = weights(path, prefix)
    state = {key: reader.read(f"{prefix}{key}") for key in (COUNTERS, RULE)}
    return saved_snapshot(state), {key: value for key, value in own.items() if key not in state}


def weights(path: Path, prefix: str) -> dict[str, Tensor]:
    """Return the tensors with a prefix by the rest of their names."""
    reader = TensorReader(path)
    return {
        key.removeprefix(prefix): reader.read(key) for key in stored_tensors(path) if key.startswith(prefix)
    }


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the norm of the difference over the tensors of `one`, in float64."""
    squares = [(one[name].double() - other[name].double()).square().sum() for name in one]
    return float(torch.stack(squares).sum().sqrt())
