"""Findings on the perceptron of `experiment=digits_noise`: seconds a run."""

from collections.abc import Iterator, Sequence

from tests.findings.runs import Runs, evaluated, spread

STEPS = 1000
KAPPA = 4
"""Factor of the batch."""
DECAY = 0.99


def batch(runs: Runs, seeds: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Grow the batch and the rate by κ, and compare the average of decay β^κ, and of decay β, with the small batch.

    Both are compared after the same numbers of samples: mean absolute difference of the loss over the evaluations.
    """
    scaled = round(DECAY**KAPPA, 6)
    apart: dict[float, list[float]] = {scaled: [], DECAY: []}
    for seed in seeds:
        own = ("experiment=digits_noise", "data.label_noise=0", f"seed={seed}")
        small = evaluated(
            runs.train(
                f"batch-small-{seed}",
                *(*own, "trainer.global_batch_size=32", "optimizer.lr=0.02", f"trainer.steps={STEPS}"),
                *("trainer.eval_every=40", f"ema.decays=[{DECAY:g}]"),
            ),
            f"ema/{DECAY:g}",
        )
        large = runs.train(
            f"batch-large-{seed}",
            *(*own, f"trainer.global_batch_size={32 * KAPPA}", f"optimizer.lr={0.02 * KAPPA:g}"),
            *(f"trainer.steps={STEPS // KAPPA}", f"trainer.eval_every={40 // KAPPA}"),
            f"ema.decays=[{scaled:g},{DECAY:g}]",
        )
        for decay, found in apart.items():
            losses = evaluated(large, f"ema/{decay:g}")
            both = [step for step in small if step // KAPPA in losses and step % KAPPA == 0]
            found.append(sum(abs(small[step] - losses[step // KAPPA]) for step in both) / len(both))
    for decay, found in apart.items():
        name = "β^κ" if decay == scaled else "β"
        yield (
            f"batch x {KAPPA}, decay {name} = {decay:g}",
            f"loss apart by {spread(found)} of the small batch",
        )


def noise(runs: Runs, seeds: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Compare the accuracy of the average and of the live weights with correct and with wrong training labels."""
    for share in (0.0, 0.3, 0.5):
        live, gain = [], []
        for seed in seeds:
            run = runs.train(
                f"noise-{share:g}-{seed}",
                *("experiment=digits_noise", f"data.label_noise={share:g}", f"seed={seed}"),
            )
            live.append(100 * evaluated(run, "live", "accuracy")[STEPS])
            gain.append(100 * evaluated(run, "ema/0.99", "accuracy")[STEPS] - live[-1])
        yield (
            f"{share:.0%} wrong labels",
            f"live {spread(live, 1)} % correct, EMA 0.99 {spread(gain, 1)} points more",
        )
