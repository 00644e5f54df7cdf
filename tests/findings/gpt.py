"""Findings on the small GPT (`experiment=small_gpt`): bytes, 0.1 M parameters, losses in nats per byte."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.findings.runs import Runs, evaluated, spread

STEPS = 1200
RATES = (1e-3, 3e-3, 9e-3)
WINDOWS = (0.1, 0.25)
LENGTHS = (400, 800, 1200)
WIDTHS = (0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2)
DECAYS = (0.9, 0.97, 0.99, 0.997, 0.999)

Row = tuple[str, str]
"""What is compared, and the figures."""


def constant(runs: Runs, rate: float, seed: int, steps: int = STEPS) -> Path:
    """Train at a constant rate, with the averages of width 0.05 and 0.1 and their snapshots."""
    own = ("experiment=small_gpt", f"optimizer.lr={rate:g}", f"trainer.steps={steps}", f"seed={seed}")
    return runs.train(f"constant-{rate:g}-{steps}-{seed}", *own)


def merging(runs: Runs, seeds: Sequence[int]) -> Iterator[Row]:
    """Compare merges of the newest weights with real cool-downs that were forked from the same run.

    The share is that of the cool-down's gain over the live weights of the constant rate, at the same step.
    """
    for rate in RATES:
        for window in WINDOWS:
            shares: dict[str, list[float]] = {"linear": [], "minus_sqrt": [], "width 0.05": []}
            behind: dict[str, list[float]] = {name: [] for name in shares}
            for seed in seeds:
                run = constant(runs, rate, seed)
                steps = round(window * STEPS)
                cooled = runs.train(
                    f"cooled-{rate:g}-{window:g}-{seed}",
                    f"fork={run}@{STEPS - steps}",
                    "schedule=wsd",
                    f"schedule.decay_fraction={window:g}",
                )
                losses = runs.made(run, "profile=linear,minus_sqrt", f"window={steps}")
                live, cool = losses["live"], evaluated(cooled, "live")[STEPS]
                merged = {name: losses.get(f"{name} {steps}") for name in shares}
                merged["width 0.05"] = losses["ema/power_sigma0.05"]
                for name, loss in merged.items():
                    assert loss is not None
                    shares[name].append(100 * (live - loss) / (live - cool))
                    behind[name].append(loss - cool)
            yield (
                f"rate {rate:g}, last {window:.0%}",
                "; ".join(
                    f"{name} {spread(share, 0)} % ({spread(behind[name])} above)"
                    for name, share in shares.items()
                ),
            )


def cosine(runs: Runs, seeds: Sequence[int]) -> Iterator[Row]:
    """Compare one run at a constant rate, with its average, with one run per length whose rate falls by a cosine.

    Likewise a rate of 1 / sqrt(step), with the average of `ema=fraction`. Each gets the better of two rates.
    """
    ways: dict[str, Callable[[float, int], dict[int, float]]] = {
        "cosine, live": lambda rate, seed: {
            steps: evaluated(
                runs.train(
                    f"cosine-{rate:g}-{steps}-{seed}",
                    *("experiment=small_gpt", "schedule=cosine", "schedule.warmup_steps=50", "ema=off"),
                    *(f"optimizer.lr={rate:g}", f"trainer.steps={steps}", f"seed={seed}"),
                ),
                "live",
            )[steps]
            for steps in LENGTHS
        },
        "constant, live": lambda rate, seed: evaluated(constant(runs, rate, seed), "live"),
        "constant, width 0.05": lambda rate, seed: evaluated(
            constant(runs, rate, seed), "ema/power_sigma0.05"
        ),
        "1/sqrt, live": lambda rate, seed: evaluated(_inverse(runs, rate, seed), "live"),
        "1/sqrt, ema=fraction": lambda rate, seed: evaluated(_inverse(runs, rate, seed), "ema/fraction_0.05"),
    }
    for name, losses_of in ways.items():
        rates = (9e-3, 2e-2) if name.startswith("1/sqrt") else (3e-3, 9e-3)
        found = {rate: [losses_of(rate, seed) for seed in seeds] for rate in rates}
        best = min(found, key=lambda rate: sum(losses[STEPS] for losses in found[rate]))
        yield (
            f"{name} (rate {best:g})",
            ", ".join(f"{n} steps {spread([losses[n] for losses in found[best]])}" for n in LENGTHS),
        )


def _inverse(runs: Runs, rate: float, seed: int) -> Path:
    return runs.train(
        f"inverse-{rate:g}-{seed}",
        *("experiment=small_gpt", "schedule=inverse_sqrt", "schedule.warmup_steps=50", "ema=fraction"),
        *(f"optimizer.lr={rate:g}", f"seed={seed}"),
    )


def width(runs: Runs, seeds: Sequence[int]) -> Iterator[Row]:
    """Find the best relative width of the power rule at each rate and length, from the snapshots of one run."""
    for steps in (400, STEPS):
        for rate in RATES:
            best = []
            for seed in seeds:
                run = constant(runs, rate, seed, steps)
                losses = runs.made(run, f"sigma_rel={','.join(f'{w:g}' for w in WIDTHS)}")
                best.append(optimum(WIDTHS, [losses[f"sigma_rel {w:g}"] for w in WIDTHS]))
            yield f"rate {rate:g}, {steps} steps", f"best width {spread(best, 3)}"


def optimum(widths: Sequence[float], losses: Sequence[float]) -> float:
    """Return the minimum of the parabola in log width through the lowest loss and its two neighbours."""
    lowest = min(range(1, len(widths) - 1), key=lambda i: losses[i])
    around = slice(lowest - 1, lowest + 2)
    if losses[lowest] > min(losses[0], losses[-1]):
        return widths[0] if losses[0] < losses[-1] else widths[-1]
    curve, slope, _ = np.polyfit(np.log(widths[around]), losses[around], 2)
    return math.exp(-slope / (2 * curve))


def too_long(runs: Runs, seeds: Sequence[int]) -> Iterator[Row]:
    """Compare constant decays with the live weights at two lengths."""
    for steps in (400, STEPS):
        gaps: dict[float, list[float]] = {decay: [] for decay in DECAYS}
        for seed in seeds:
            losses = runs.made(
                constant(runs, 3e-3, seed, steps), f"decay={','.join(f'{d:g}' for d in DECAYS)}"
            )
            for decay in DECAYS:
                gaps[decay].append(losses["live"] - losses[f"decay {decay:g}"])
        yield (
            f"{steps} steps, live - EMA",
            ", ".join(f"{decay:g}: {spread(gap)}" for decay, gap in gaps.items()),
        )


def lag(runs: Runs, seeds: Sequence[int]) -> Iterator[Row]:
    """Compare the best average of a search, corrected for its lag, with the best one without correction, on half B."""
    found: list[tuple[float, float, bool]] = []
    for steps in (400, STEPS):
        for rate in RATES:
            # Twenty runs with the three usual seeds.
            own = [*seeds, *(range(3, 5) if (rate, steps) == (3e-3, 400) and len(seeds) > 1 else ())]
            gains = [gain_of_correction(runs.result(constant(runs, rate, seed, steps))) for seed in own]
            found += gains
            figures = ", ".join(
                f"{gain:+.4f} ± {error:.4f}{'' if chosen else ' (not chosen)'}"
                for gain, error, chosen in gains
            )
            yield f"rate {rate:g}, {steps} steps, gain of each seed ± its standard error", figures
    worse = sum(gain < -2 * error for gain, error, chosen in found if chosen)
    yield (
        f"{len(found)} runs",
        f"chosen in {sum(chosen for *_, chosen in found)}; of these worse on half B by 2 standard errors: {worse}",
    )


def gain_of_correction(result: Mapping[str, Any]) -> tuple[float, float, bool]:
    """Return by how much the corrected average is better on half B, its standard error, and whether it was chosen.

    Zero if the search found nothing to correct.
    """
    averages = result["averages"]
    corrected = next((name for name in averages if "without lag" in name), None)
    if corrected is None:
        return 0.0, 0.0, False
    if result["best"] != corrected:
        gap, error = averages[corrected]["minus_best_b"]
        return -gap, error, False
    plain = min((name for name in averages if name != corrected), key=lambda name: averages[name]["half_a"])
    gap, error = averages[plain]["minus_best_b"]
    return gap, error, True
