"""Results of averages that are made from stored weights: the choice on half A of the samples, its check on half B."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ema.posthoc import Synthesis
from launch.synthesizing.cooldown import Cooldown
from trainer.errors import ConfigError
from trainer.evaluation.evaluation import paired_gap
from trainer.report.format import display_name, format_interval, format_p
from trainer.report.pairs import not_excluded
from trainer.report.statistics import ALPHA, Estimate
from trainer.report.text.table import Line, Table
from trainer.rundir.keys import AVERAGE, LIVE


@dataclass(frozen=True)
class Trial:
    """Weights that were evaluated."""

    name: str
    values: Tensor
    """Values of the primary metric, float64 `[samples]`."""
    synthesis: Synthesis | None = None
    """Coefficients, and how close they come; None for stored weights."""
    horizon: float | None = None
    """Number of steps that its decay remembers; None for weights without a decay."""
    corrects: bool = False
    """Whether it is a correction of another trial, which half B has to confirm."""

    @property
    def is_constant(self) -> bool:
        """Whether it is an average with a constant decay that was made."""
        return self.name.startswith("decay ") and not self.corrects

    def mean(self, half: int) -> float:
        """Return the mean over half 0 (A) or 1 (B): every other sample of the evaluation set, whose order is random."""
        return float(self.values[half::2].mean())


@dataclass(frozen=True)
class Verdict:
    """Choice among trials."""

    best: Trial
    """Best one on half A."""
    gaps: dict[str, Estimate]
    """Difference of each other trial to it on half B, by name."""
    refused: str | None = None
    """Name of a correction that was best on half A and was not confirmed on half B."""

    @property
    def may_be_best(self) -> list[str]:
        """Names of the others that half B does not show to be worse."""
        return sorted(not_excluded(self.gaps))


def judge(trials: Sequence[Trial], *, higher_is_better: bool) -> Verdict:
    """Choose the best weights on half A and compare all others with it on half B.

    A correction is chosen only if it is better on half A and clearly better on half B than the best of all others.

    Raises:
        ConfigError: No trial has finite values.
    """
    finite = [trial for trial in trials if trial.values.isfinite().all()]
    plain = [trial for trial in finite if not trial.corrects]
    if not plain:
        raise ConfigError("the primary metric is not finite for any weights")
    better = max if higher_is_better else min
    best = better(plain, key=lambda trial: trial.mean(0))
    top, refused = better(finite, key=lambda trial: trial.mean(0)), None
    if top is not best:
        gap = _on_half_b(top, best)
        if gap.p <= ALPHA and (gap.mean > 0) == higher_is_better:
            best = top
        else:
            refused = top.name
    gaps = {trial.name: _on_half_b(trial, best) for trial in finite if trial is not best}
    return Verdict(best, gaps, refused)


def _on_half_b(trial: Trial, best: Trial) -> Estimate:
    gap, error = paired_gap(trial.values[1::2], best.values[1::2])
    return Estimate(gap, error, best.values[1::2].numel() - 1)


def headline(verdict: Verdict, trials: Sequence[Trial], metric: str, step: int) -> str:
    """Name the chosen weights, and what the other half of the samples confirms."""
    best = verdict.best
    count = best.values[1::2].numel()
    found = (
        f"Chosen at step {step} by {metric} on half of the samples (A): {shown(best.name)}."
        f" On the other {count} samples (B) it has {best.mean(1):.5g}"
    )
    clear = [name for name in verdict.gaps if name not in verdict.may_be_best]
    if len(clear) == len(verdict.gaps):
        sentence = f"{found} and is clearly better than all {len(clear)} others."
    else:
        names = ", ".join(shown(trial.name) for trial in trials if trial.name in verdict.may_be_best)
        sentence = f"{found}; not clearly worse there: {names}."
    if verdict.refused is not None:
        sentence += f" {shown(verdict.refused)} was better on A, but not clearly on B, so it was not chosen."
    return sentence


def table(
    verdict: Verdict, trials: Sequence[Trial], metric: str, step: int, cooldown: Cooldown | None = None
) -> Table:
    """Return the table of all trials, with their shares of the gain of a cool-down if one was evaluated."""
    lines = []
    shares = shares_of(cooldown, trials)
    for trial in trials:
        error = trial.synthesis.error if trial.synthesis else None
        gap = verdict.gaps.get(trial.name)
        cells = [
            shown(trial.name),
            "stored" if error is None else f"{error:.2g}",
            f"{trial.mean(0):.4f}",
            f"{trial.mean(1):.4f}",
            "-" if gap is None else format_interval(gap),
            "-" if gap is None else format_p(gap.p),
        ]
        keys = [trial.name, error, trial.mean(0), trial.mean(1), gap.mean if gap else None, None]
        if cooldown is not None:
            share = shares.get(trial.name)
            cells.append("-" if share is None else _percent(share))
            keys.append(None if share is None else share.mean)
        lines.append(Line(cells, keys, trial is verdict.best))
    headers = ["weights", "error", f"{metric}, half A", "half B", "minus the chosen, B [95 % CI]", "p, B"]
    notes = [
        "error: predicted distance to the named average, relative to that average's distance from the live weights.",
        "Half A chooses, half B measures: each has every other sample of the evaluation set. CI and p"
        " unadjusted; the sentence above adjusts for the number of averages.",
    ]
    if cooldown is not None:
        headers.append("of the cool-down's gain, B")
        value = float(cooldown.values[1::2].mean())
        notes.append(
            f"Cool-down {cooldown.name}, forked at step {cooldown.begins}: {metric} {value:.4f} on half B. Its gain is"
            " that over the live weights."
        )
        if not shares:
            notes.append("It is not clearly better than the live weights, so there are no shares.")
    return Table(
        f"averages made at step {step}", headers, lines, headline(verdict, trials, metric, step), notes
    )


def shares_of(cooldown: Cooldown | None, trials: Sequence[Trial]) -> dict[str, Estimate]:
    """Return the share of the cool-down's gain of each trial but the live weights, by name; empty without a gain."""
    live = next((trial for trial in trials if trial.name == LIVE), None)
    if cooldown is None or live is None:
        return {}
    found = {trial.name: cooldown.share(live.values, trial.values) for trial in trials if trial.name != LIVE}
    return {name: share for name, share in found.items() if share is not None}


def _percent(share: Estimate) -> str:
    low, high = share.interval
    return f"{share.mean:.0%} [{100 * low:.0f}, {100 * high:.0f}]"


def cooldown_json(cooldown: Cooldown, trials: Sequence[Trial]) -> dict[str, Any]:
    """Return a cool-down for the result file: its means, and share and standard error by the name of the weights."""
    shares = shares_of(cooldown, trials)
    return {
        "run": cooldown.name,
        "forked_at": cooldown.begins,
        "half_a": _number(float(cooldown.values[0::2].mean())),
        "half_b": _number(float(cooldown.values[1::2].mean())),
        "share_of_gain": {name: [share.mean, share.se] for name, share in shares.items()},
    }


def to_json(trial: Trial, verdict: Verdict) -> dict[str, Any]:
    """Return a trial for the result file; `minus_best_b` is the paired difference on half B and its standard error."""
    found: dict[str, Any] = {"half_a": _number(trial.mean(0)), "half_b": _number(trial.mean(1))}
    if (gap := verdict.gaps.get(trial.name)) is not None:
        found["minus_best_b"] = [_number(gap.mean), _number(gap.se)]
    if trial.horizon is not None:
        found["horizon"] = trial.horizon
    if trial.synthesis is not None:
        found["predicted_error"] = _number(trial.synthesis.error)
        found["amplification"] = trial.synthesis.amplification
        found["warnings"] = trial.synthesis.warnings
    return found


def shown(name: str) -> str:
    """Return the name of weights as tables show it."""
    if name.startswith(AVERAGE):
        return display_name(name.removeprefix(AVERAGE))
    return name


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
